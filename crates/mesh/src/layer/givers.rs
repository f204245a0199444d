//! Who gave each piece of a layer.

/// Who gave which piece. Names are few, so a piece takes a byte.
#[derive(Default)]
pub(super) struct Givers {
    names: Vec<String>,
    /// By piece: the position of the name, from 1.
    by_piece: Vec<u8>,
}

impl Givers {
    pub(super) fn note(&mut self, index: u32, node: &str) {
        let known = self.names.iter().position(|name| name == node);
        let position = known.unwrap_or_else(|| {
            self.names.push(node.to_owned());
            self.names.len() - 1
        });
        let index = index as usize;
        if self.by_piece.len() <= index {
            self.by_piece.resize(index + 1, 0);
        }
        // Of more parents than a byte can name, it is not known which.
        self.by_piece[index] = u8::try_from(position + 1).unwrap_or(0);
    }

    pub(super) fn of(&self, index: u32) -> Option<String> {
        let position = usize::from(*self.by_piece.get(index as usize)?).checked_sub(1)?;
        self.names.get(position).cloned()
    }
}

//! How far an order is, in the words that the manager is told.

use darter_identity::attend::{PreheatLayer, PreheatUpdate};

use crate::layer::LayerRequest;

/// How far each layer of an order is.
pub struct Board {
    update: PreheatUpdate,
    /// Something changed since the last report.
    news: bool,
}

impl Board {
    /// All requests are of one repository, and each has a source.
    pub fn new(id: String, requests: &[LayerRequest]) -> Self {
        let layers = requests.iter().map(|request| PreheatLayer {
            diff_id: request.task.diff_id,
            blob: request.sources[0].blob,
            size: request.sources[0].size,
            read: 0,
            done: false,
            error: None,
        });
        let repository = requests.first().map(|request| request.sources[0].repository.clone());
        let update = PreheatUpdate { id, layers: layers.collect(), repository, ..PreheatUpdate::default() };
        Self { update, news: true }
    }

    /// So many bytes were read, of `size` (0: as before). They only grow; a layer that is done has all of them.
    pub fn see(&mut self, at: usize, read: u64, size: u64) {
        let layer = &mut self.update.layers[at];
        if layer.done || read <= layer.read {
            return;
        }
        layer.read = read;
        layer.size = layer.size.max(size).max(read);
        self.news = true;
    }

    /// The layer is there, or why it isn't.
    pub fn settle(&mut self, at: usize, error: Option<String>) {
        let layer = &mut self.update.layers[at];
        layer.done = error.is_none();
        if layer.done {
            layer.read = layer.size;
        }
        layer.error = error;
        self.news = true;
    }

    /// The report, if it differs from the last one.
    pub fn news(&mut self) -> Option<PreheatUpdate> {
        std::mem::take(&mut self.news).then(|| self.update.clone())
    }

    /// The last report. The order failed if one layer did.
    pub fn last(mut self) -> PreheatUpdate {
        let failed = self.update.layers.iter().filter(|layer| !layer.done).count();
        let first = self.update.layers.iter().find_map(|layer| layer.error.clone());
        self.update.done = true;
        self.update.error =
            first.map(|first| format!("{failed} of {} layers failed: {first}", self.update.layers.len()));
        self.update
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use darter_types::{BlobDigest, DiffId, Digest, LayerSource, LayerTask};

    fn board(sizes: &[u64]) -> Board {
        let request = |size: &u64| LayerRequest {
            task: LayerTask::current(DiffId(Digest::of(&size.to_le_bytes()))),
            sources: vec![LayerSource {
                repository: "https://registry.example/app".parse().unwrap(),
                blob: BlobDigest(Digest::of(b"blob")),
                size: *size,
            }],
            credential: None,
        };
        Board::new("order".to_owned(), &sizes.iter().map(request).collect::<Vec<_>>())
    }

    #[test]
    fn only_changes_are_news() {
        let mut board = board(&[100]);
        assert!(board.news().is_some() && board.news().is_none());
        board.see(0, 40, 100);
        assert_eq!(board.news().unwrap().layers[0].read, 40);
        board.see(0, 40, 100);
        assert!(board.news().is_none());
    }

    #[test]
    fn layer_that_is_done_has_all_bytes() {
        let mut board = board(&[100]);
        board.settle(0, None);
        let last = board.last();
        assert!(last.done && last.error.is_none() && last.layers[0].done);
        assert_eq!(last.layers[0].read, 100);
    }

    #[test]
    fn one_failed_layer_fails_the_order_and_says_why() {
        let mut board = board(&[100, 200]);
        board.settle(0, None);
        board.settle(1, Some("404".to_owned()));
        let last = board.last();
        assert_eq!(last.error.as_deref(), Some("1 of 2 layers failed: 404"));
        assert!(last.done && last.layers[0].done && !last.layers[1].done);
    }
}

//! Where in a layer's content stream the bytes of a file are.

use std::ops::Range;

use darter_layer::{Content, FileContent};

/// A run of a file's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extent {
    Hole { len: u64 },
    Data { content: u64, len: u64 },
}

/// The bytes from `offset` on, at most `size`, none past the end of the file.
pub(super) fn extents(file: &FileContent<'_>, offset: u64, size: u64) -> Vec<Extent> {
    let end = offset.saturating_add(size).min(file.size);
    let mut found = Vec::new();
    if offset >= end {
        return found;
    }
    match file.content {
        Content::Whole { start } => found.push(Extent::Data { content: start + offset, len: end - offset }),
        Content::Sparse { mut start, segments } => {
            let mut at = offset;
            for segment in segments {
                let (from, to) = (segment.offset.max(at), (segment.offset + segment.len).min(end));
                if from < to {
                    push_hole(&mut found, at, from);
                    found.push(Extent::Data { content: start + (from - segment.offset), len: to - from });
                    at = to;
                }
                start += segment.len;
            }
            push_hole(&mut found, at, end);
        }
    }
    found
}

fn push_hole(extents: &mut Vec<Extent>, from: u64, to: u64) {
    if from < to {
        extents.push(Extent::Hole { len: to - from });
    }
}

/// All that the file has in the content stream.
pub(super) fn content(file: &FileContent<'_>) -> Range<u64> {
    match file.content {
        Content::Whole { start } => start..start + file.size,
        Content::Sparse { start, segments } => {
            start..start + segments.iter().map(|segment| segment.len).sum::<u64>()
        }
    }
}

#[cfg(test)]
mod tests {
    use darter_layer::Segment;

    use super::*;

    const SEGMENTS: &[Segment] = &[Segment { offset: 10, len: 5 }, Segment { offset: 20, len: 10 }];

    fn sparse() -> FileContent<'static> {
        FileContent { layer: 0, size: 40, content: Content::Sparse { start: 100, segments: SEGMENTS } }
    }

    #[test]
    fn a_plain_file_ends_where_it_ends() {
        let file = FileContent { layer: 0, size: 40, content: Content::Whole { start: 100 } };
        assert_eq!(extents(&file, 30, 100), [Extent::Data { content: 130, len: 10 }]);
        assert_eq!(extents(&file, 40, 1), []);
        assert_eq!(extents(&file, u64::MAX, u64::MAX), []);
        assert_eq!(content(&file), 100..140);
    }

    #[test]
    fn holes_of_a_sparse_file_are_zeros() {
        let whole = extents(&sparse(), 0, 100);
        assert_eq!(
            whole,
            [
                Extent::Hole { len: 10 },
                Extent::Data { content: 100, len: 5 },
                Extent::Hole { len: 5 },
                Extent::Data { content: 105, len: 10 },
                Extent::Hole { len: 10 },
            ]
        );
        assert_eq!(content(&sparse()), 100..115);
    }

    #[test]
    fn a_read_may_start_inside_a_segment() {
        let part = extents(&sparse(), 12, 10);
        let data = |content, len| Extent::Data { content, len };
        assert_eq!(part, [data(102, 3), Extent::Hole { len: 5 }, data(105, 2)]);
    }
}

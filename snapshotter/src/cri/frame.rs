//! The frame of a gRPC message: one byte that says whether it is compressed, four with its length.

/// The message of a body that holds exactly one, uncompressed; `None` for anything else.
pub(super) fn message(body: &[u8]) -> Option<&[u8]> {
    let (head, message) = body.split_at_checked(5)?;
    let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]);
    (head[0] == 0 && usize::try_from(length).ok()? == message.len()).then_some(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_whole_uncompressed_message_is_read() {
        assert_eq!(message(&[0, 0, 0, 0, 2, 7, 8]), Some(&[7, 8][..]));
        assert_eq!(message(&[0, 0, 0, 0, 0]), Some(&[][..]));
        for bad in [&[0, 0, 0, 0][..], &[1, 0, 0, 0, 1, 7], &[0, 0, 0, 0, 3, 7], &[0, 0, 0, 0, 1, 7, 8]] {
            assert_eq!(message(bad), None);
        }
    }
}

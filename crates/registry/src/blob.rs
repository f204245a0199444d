//! A blob as a stream that survives broken connections: it goes on from the byte that it had reached.

use std::pin::Pin;

use bytes::{Buf, Bytes, BytesMut};
use darter_types::{Digest, Repository};
use futures_util::{Stream, StreamExt};
use http::header::{CONTENT_LENGTH, CONTENT_RANGE, RANGE};
use http::{Method, StatusCode};

use crate::client::{Ask, Client, Need};
use crate::credential::Credential;
use crate::error::RegistryError;
use crate::retry::Retry;
use crate::transport::Incoming;

pub type BlobStream = Pin<Box<dyn Stream<Item = Result<Bytes, RegistryError>> + Send>>;

/// A blob that is being read. Nothing has checked its bytes.
pub struct Blob {
    /// Bytes of the whole blob, not only of the stream; `None` if the registry doesn't say.
    pub size: Option<u64>,
    /// Ends when the blob does; a stream that ends earlier ends with an error.
    pub stream: BlobStream,
}

impl Blob {
    pub(crate) async fn open(
        client: Client,
        repository: Repository,
        digest: Digest,
        credential: Option<Credential>,
        offset: u64,
    ) -> Result<Self, RegistryError> {
        let answer = client.tries(&repository);
        let mut reader = Reader {
            client,
            repository,
            digest,
            credential,
            position: offset,
            size: None,
            skip: 0,
            body: None,
            retry: answer,
        };
        reader.connect().await?;
        reader.retry = Retry::new(reader.client.patience(), reader.client.patience().resume);
        let size = reader.size;
        let step = |mut reader: Reader| async move { Ok(reader.next().await?.map(|bytes| (bytes, reader))) };
        Ok(Self { size, stream: Box::pin(futures_util::stream::try_unfold(reader, step)) })
    }

    /// The rest of the stream at once, if it has no more than `limit` bytes.
    pub async fn collect(mut self, limit: u64) -> Result<Bytes, RegistryError> {
        let mut all = BytesMut::new();
        while let Some(bytes) = self.stream.next().await {
            all.extend_from_slice(&bytes?);
            if all.len() as u64 > limit {
                return Err(RegistryError::TooLarge { what: "blob".to_owned(), limit });
            }
        }
        Ok(all.freeze())
    }
}

struct Reader {
    client: Client,
    repository: Repository,
    digest: Digest,
    credential: Option<Credential>,
    /// The next byte to give.
    position: u64,
    size: Option<u64>,
    /// Bytes to drop first, because the server began at the start.
    skip: u64,
    body: Option<Incoming>,
    retry: Retry,
}

impl Reader {
    /// The next bytes; `None` at the blob's end.
    async fn next(&mut self) -> Result<Option<Bytes>, RegistryError> {
        loop {
            if self.size == Some(self.position) && self.skip == 0 {
                return Ok(None);
            }
            match self.read().await {
                Ok(Some(bytes)) if bytes.is_empty() => {}
                Ok(Some(bytes)) => {
                    self.position += bytes.len() as u64;
                    self.retry.progress();
                    return Ok(Some(bytes));
                }
                Ok(None) => return Ok(None),
                Err(error) => {
                    self.body = None;
                    self.retry.pause(error).await?;
                }
            }
        }
    }

    /// One step: connects if need be, reads what comes, drops what was read before. `None` at the blob's end.
    async fn read(&mut self) -> Result<Option<Bytes>, RegistryError> {
        if self.body.is_none() {
            self.connect_once().await?;
        }
        let incoming = self.body.as_mut().expect("connect_once() fails or leaves a body");
        let Some(mut bytes) = self.client.transport().chunk(incoming).await? else {
            let cut = self.size.is_some_and(|size| self.position < size) || self.skip > 0;
            let reason = "unexpected EOF".to_owned();
            let error = RegistryError::Broken { url: crate::error::shown(&incoming.url), reason };
            return if cut { Err(error) } else { Ok(None) };
        };
        let skipped = self.skip.min(bytes.len() as u64);
        self.skip -= skipped;
        bytes.advance(usize::try_from(skipped).expect("no more than the length of a buffer"));
        let left = self.size.map_or(u64::MAX, |size| size - self.position);
        bytes.truncate(usize::try_from(left).unwrap_or(usize::MAX));
        Ok(Some(bytes))
    }

    /// Opens the body for the first time.
    async fn connect(&mut self) -> Result<(), RegistryError> {
        loop {
            match self.connect_once().await {
                Ok(()) => return Ok(()),
                Err(error) => self.retry.pause(error).await?,
            }
        }
    }

    /// Asks the registry for what is missing; it is always asked itself, for an address that it signed may be old.
    async fn connect_once(&mut self) -> Result<(), RegistryError> {
        let mut ask = Ask::new(Method::GET, Need::Pull, format!("blobs/{}", self.digest));
        if self.position > 0 {
            ask = ask.with_header(RANGE, &format!("bytes={}-", self.position));
        }
        let incoming = self.client.try_each(&self.repository, &ask, self.credential.as_ref()).await?;
        let (start, size) = extent(&incoming)?;
        let consistent = match (self.size, size) {
            (Some(before), Some(now)) => before == now,
            _ => true,
        };
        if start > self.position || !consistent || size.is_some_and(|size| size < self.position) {
            let reason = format!("the answer begins at {start} of {size:?}; {} was asked for", self.position);
            return Err(RegistryError::protocol(&incoming.url, reason));
        }
        self.skip = self.position - start;
        self.size = self.size.or(size);
        self.body = Some(incoming);
        Ok(())
    }
}

/// Where the answer's bytes start in the blob, and the blob's size if it says it.
fn extent(incoming: &Incoming) -> Result<(u64, Option<u64>), RegistryError> {
    if incoming.response.status() != StatusCode::PARTIAL_CONTENT {
        return Ok((0, incoming.header(CONTENT_LENGTH.as_str()).and_then(|text| text.parse().ok())));
    }
    let text = incoming.header(CONTENT_RANGE.as_str()).unwrap_or_default();
    parse_range(text).ok_or_else(|| {
        RegistryError::protocol(&incoming.url, format!("the content range {text:?} can't be read"))
    })
}

/// Start and size of `bytes 5-9/10` or `bytes 5-9/*`.
fn parse_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, size) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (start, end) = range.split_once('-')?;
    let (start, end): (u64, u64) = (start.trim().parse().ok()?, end.trim().parse().ok()?);
    let size = if size == "*" { None } else { Some(size.trim().parse().ok()?) };
    (start <= end && size.is_none_or(|size| end < size)).then_some((start, size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges_are_read() {
        assert_eq!(parse_range("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(parse_range("bytes 5-9/*"), Some((5, None)));
        for bad in ["", "bytes 9-5/10", "bytes 5-10/10", "bytes */10", "lines 1-2/3", "bytes 1-2"] {
            assert_eq!(parse_range(bad), None, "{bad}");
        }
    }
}

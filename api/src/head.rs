//! Reads the first request of a connection up to the end of its headers, into a buffer that grows with what
//! the client sends. hyper would allocate 16 KiB before the first byte arrives.

use std::io;
use tokio::{net::TcpStream, pin, select};

/// The largest number of bytes that one call reads.
const CHUNK: usize = 4096;

/// Reads until the headers are complete, malformed, or at least `max` bytes long, because hyper can answer
/// then. Returns `None` if the client closes the connection before that, or if the headers are incomplete
/// when `stopped` is ready.
pub async fn read<S>(
    stream: &mut TcpStream,
    max: usize,
    stopped: impl Future<Output = S>,
) -> Option<Vec<u8>> {
    pin!(stopped);
    let mut head = Vec::new();
    loop {
        select! {
            biased;
            readable = stream.readable() => readable.ok()?,
            _ = &mut stopped => return None,
        }
        // This buffer is on the stack, because it is not needed while the future waits.
        let mut chunk = [0; CHUNK];
        match stream.try_read(&mut chunk) {
            Ok(0) => return None,
            Ok(length) => {
                let is_first = head.is_empty();
                head.extend_from_slice(&chunk[..length]);
                // Parsing after each byte would take time that grows with the square of the length.
                let may_be_complete = is_first || chunk[..length].contains(&b'\n');
                if head.len() >= max || (may_be_complete && !is_partial(&head)) {
                    return Some(head);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return None,
        }
    }
}

fn is_partial(head: &[u8]) -> bool {
    // hyper accepts at most this many headers. hyper refuses a request with more headers without waiting for
    // the rest.
    let mut headers = [httparse::EMPTY_HEADER; 100];
    matches!(httparse::Request::new(&mut headers).parse(head), Ok(httparse::Status::Partial))
}

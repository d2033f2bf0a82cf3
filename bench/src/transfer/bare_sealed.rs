//! The bare loop that encrypts: the least that a process does which moves memory so.
//!
//! Records of 16 KiB, as TLS has them at most, each copied out of memory, sealed in place by AES-128-GCM and written;
//! as many of them at once as make up 256 KiB. There is no handshake, and the key is known.

use std::io::{self, Read, Write};

use ring::aead::{AES_128_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::error::Unspecified;
use vm_memory::VolatileSlice;

const RECORD_BYTES: usize = 16 << 10;
const RECORDS_AT_ONCE: usize = 16;

fn failed(_: Unspecified) -> io::Error {
    io::Error::other("a record was not sealed, or not opened")
}

/// One direction of a connection.
struct Sealer {
    key: LessSafeKey,
    records: u64,
}

impl Sealer {
    fn new() -> io::Result<Self> {
        let key = UnboundKey::new(&AES_128_GCM, &[7; 16]).map_err(failed)?;
        Ok(Self { key: LessSafeKey::new(key), records: 0 })
    }

    fn nonce(&mut self) -> Nonce {
        let mut nonce = [0; NONCE_LEN];
        nonce[..8].copy_from_slice(&self.records.to_le_bytes());
        self.records += 1;
        Nonce::assume_unique_for_key(nonce)
    }
}

/// How many system calls it took.
pub(super) fn send(mut stream: impl Write, part: &VolatileSlice<'_>) -> io::Result<u64> {
    let (mut sealer, mut out, mut calls) = (Sealer::new()?, Vec::new(), 0);
    let mut done = 0;
    while done < part.len() {
        out.clear();
        for _ in 0..RECORDS_AT_ONCE {
            let bytes = RECORD_BYTES.min(part.len() - done);
            let start = out.len();
            out.resize(start + bytes, 0);
            let piece = part.subslice(done, bytes).map_err(io::Error::other)?;
            piece.copy_to(&mut out[start..]);
            let nonce = sealer.nonce();
            let tag = sealer.key.seal_in_place_separate_tag(nonce, Aad::empty(), &mut out[start..]);
            out.extend_from_slice(tag.map_err(failed)?.as_ref());
            done += bytes;
        }
        stream.write_all(&out)?;
        calls += 1;
    }
    Ok(calls)
}

/// How many system calls it took.
pub(super) fn receive(mut stream: impl Read, part: &VolatileSlice<'_>) -> io::Result<u64> {
    let (mut sealer, mut calls) = (Sealer::new()?, 0);
    let sealed_bytes = RECORD_BYTES + AES_128_GCM.tag_len();
    let mut came = vec![0; RECORDS_AT_ONCE * sealed_bytes];
    let (mut done, mut filled) = (0, 0);
    while done < part.len() {
        let received = stream.read(&mut came[filled..])?;
        if received == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        calls += 1;
        filled += received;
        let mut taken = 0;
        while done < part.len() {
            let bytes = RECORD_BYTES.min(part.len() - done);
            let end = taken + bytes + AES_128_GCM.tag_len();
            if end > filled {
                break;
            }
            let nonce = sealer.nonce();
            let opened = sealer.key.open_in_place(nonce, Aad::empty(), &mut came[taken..end]);
            let piece = part.subslice(done, bytes).map_err(io::Error::other)?;
            piece.copy_from(opened.map_err(failed)?);
            (done, taken) = (done + bytes, end);
        }
        came.copy_within(taken..filled, 0);
        filled -= taken;
    }
    Ok(calls)
}

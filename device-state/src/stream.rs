//! A stream and its sections.

use std::collections::HashSet;

use crate::codec::{decode_body, encode_body};
use crate::declare::Section;
use crate::error::{DecodeError, EncodeError, EncodeProblem, Problem};
use crate::wire::{FORMAT, Reader, Writer, check_name, is_name};

/// First bytes of a stream.
pub const MAGIC: [u8; 8] = *b"PFDEVST\n";
/// First bytes of a section.
const SECTION_MAGIC: [u8; 4] = *b"SECT";
/// Bytes of a stream before its first section.
const STREAM_HEADER_BYTES: usize = 16;
const SECTIONS_AT: usize = 12;
/// Bytes of a section before its name.
const SECTION_HEADER_BYTES: usize = 24;
const LEN_AT: usize = 12;
const CHECKSUM_AT: usize = 20;

/// Makes a stream out of sections.
#[derive(Debug)]
pub struct StreamWriter {
    out: Writer,
    begin: usize,
    sections: u32,
}

impl Default for StreamWriter {
    fn default() -> Self {
        Self::new()
    }
}

impl StreamWriter {
    /// A stream without sections so far.
    pub fn new() -> Self {
        Self::after(Vec::new())
    }

    /// The same, behind bytes that are there already.
    pub fn after(bytes: Vec<u8>) -> Self {
        let begin = bytes.len();
        let mut out = Writer::after(bytes);
        out.put(&MAGIC);
        out.u16(FORMAT);
        out.u16(0);
        out.u32(0);
        Self { out, begin, sections: 0 }
    }

    /// Appends a section whose payload is what `payload` writes. That no other section has the
    /// same name and instance is up to the caller. After an error the stream is as it was.
    pub fn section(
        &mut self,
        name: &str,
        instance: u32,
        version: u16,
        payload: impl FnOnce(&mut Writer) -> Result<(), EncodeError>,
    ) -> Result<(), EncodeError> {
        append_section(&mut self.out, name, instance, version, payload)?;
        self.sections += 1;
        Ok(())
    }

    /// Appends a section with a state. Its hooks may change it.
    pub fn state<S: Section>(&mut self, instance: u32, state: &mut S) -> Result<(), EncodeError> {
        self.section(S::NAME, instance, S::DECLARED.version, |out| encode_body(state, out))
    }

    /// Appends sections that were encoded apart.
    pub(crate) fn encoded(&mut self, section: &[u8]) {
        self.out.put(section);
        self.sections += 1;
    }

    /// The whole stream, and what was there before it.
    pub fn finish(self) -> Vec<u8> {
        let mut bytes = self.out.into_bytes();
        let at = self.begin + SECTIONS_AT;
        bytes[at..at + 4].copy_from_slice(&self.sections.to_le_bytes());
        bytes
    }
}

/// Appends a section with its header; after an error nothing was appended.
pub(crate) fn append_section(
    out: &mut Writer,
    name: &str,
    instance: u32,
    version: u16,
    payload: impl FnOnce(&mut Writer) -> Result<(), EncodeError>,
) -> Result<(), EncodeError> {
    if !is_name(name) {
        return Err(EncodeError::new(EncodeProblem::Name { name: name.to_owned() }));
    }
    let begin = out.bytes_mut().len();
    out.put(&SECTION_MAGIC);
    out.u32(instance);
    out.u16(version);
    // Such names are short.
    out.u16(u16::try_from(name.len()).unwrap_or(u16::MAX));
    out.put(&[0; 12]);
    out.put(name.as_bytes());
    let payload_at = out.bytes_mut().len();
    if let Err(error) = payload(out) {
        out.bytes_mut().truncate(begin);
        return Err(error.in_section(name, instance));
    }
    let section = &mut out.bytes_mut()[begin..];
    let len = (section.len() - (payload_at - begin)) as u64;
    section[LEN_AT..CHECKSUM_AT].copy_from_slice(&len.to_le_bytes());
    let checksum = checksum(section);
    section[CHECKSUM_AT..SECTION_HEADER_BYTES].copy_from_slice(&checksum.to_le_bytes());
    Ok(())
}

/// CRC-32 of everything of a section but the checksum itself.
fn checksum(section: &[u8]) -> u32 {
    let (header, rest) = section.split_at(SECTION_HEADER_BYTES);
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&header[..CHECKSUM_AT]);
    hasher.update(rest);
    hasher.finalize()
}

/// A section of a stream, its checksum checked and its payload not.
#[derive(Debug, Clone)]
pub struct RawSection<'a> {
    /// Which device's.
    pub name: &'a str,
    /// Which of several such devices'.
    pub instance: u32,
    /// The writer's version of the device.
    pub version: u16,
    /// Offset of the section in the stream.
    pub offset_bytes: u64,
    /// The payload.
    pub payload: Reader<'a>,
}

impl RawSection<'_> {
    /// The state in it. Fails as well if it is of another name.
    pub fn state<S: Section>(&self) -> Result<S, DecodeError> {
        if self.name != S::NAME {
            let (found, expected) = (self.name.to_owned(), S::NAME);
            return Err(DecodeError::new(
                self.offset_bytes,
                Problem::OtherSection { found, expected },
            ));
        }
        let mut state = S::blank();
        decode_body(&mut state, self.version, self.offset_bytes, &mut self.payload.clone())
            .map_err(|error| error.in_section(self.name, self.instance))?;
        Ok(state)
    }
}

/// The sections of a stream, in its order. Checks everything around the payloads: bytes are left
/// over nowhere, no two sections have the same name and instance, no section is damaged.
pub fn sections(stream: &[u8]) -> Result<Vec<RawSection<'_>>, DecodeError> {
    let mut input = Reader::new(stream);
    let magic = stream.get(..MAGIC.len()).unwrap_or(stream);
    if magic != MAGIC {
        return Err(input.error(Problem::Magic { found: magic.to_vec() }));
    }
    let mut header = input.part(STREAM_HEADER_BYTES)?;
    header.take(MAGIC.len())?;
    let at = header.offset_bytes();
    let found = header.u16()?;
    if found != FORMAT {
        return Err(DecodeError::new(at, Problem::Format { found, known: FORMAT }));
    }
    header.reserved::<2>()?;
    let count = header.u32()?;
    let mut sections = Vec::new();
    let mut seen = HashSet::new();
    for _ in 0..count {
        let section = section(&mut input)?;
        if !seen.insert((section.name, section.instance)) {
            return Err(DecodeError::new(section.offset_bytes, Problem::DuplicateSection)
                .in_section(section.name, section.instance));
        }
        sections.push(section);
    }
    input.end()?;
    Ok(sections)
}

fn section<'a>(input: &mut Reader<'a>) -> Result<RawSection<'a>, DecodeError> {
    let offset_bytes = input.offset_bytes();
    let mut whole = input.clone();
    let magic = input.array::<4>()?;
    if magic != SECTION_MAGIC {
        let found = magic.to_vec();
        return Err(DecodeError::new(offset_bytes, Problem::Magic { found }));
    }
    let (instance, version, name_len) = (input.u32()?, input.u16()?, input.u16()?);
    let (len, stored) = (input.u64()?, input.u32()?);
    let name_at = input.offset_bytes();
    let name = check_name(input.take(name_len.into())?, name_at)?;
    let in_section = |error: DecodeError| error.in_section(name, instance);
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    let payload = input.part(len).map_err(in_section)?;
    let section_bytes = SECTION_HEADER_BYTES + name.len() + len;
    let computed = checksum(whole.take(section_bytes).map_err(in_section)?);
    if computed != stored {
        let problem = Problem::Checksum { stored, computed };
        return Err(in_section(DecodeError::new(offset_bytes, problem)));
    }
    Ok(RawSection { name, instance, version, offset_bytes, payload })
}

//! Text.

use crate::declare::{Codec, Value};
use crate::error::{DecodeError, EncodeError, EncodeProblem, Problem};
use crate::kind::Kind;
use crate::schema::Shape;
use crate::wire::{Reader, Writer};

/// The codec of `String`: UTF-8, its bound in bytes.
#[derive(Debug)]
pub struct Text;

impl Codec<String> for Text {
    const KIND: Kind = Kind::Text;

    fn shape(max_len: u32) -> Shape {
        Shape::Text { max_len }
    }

    fn blank() -> String {
        String::new()
    }

    fn encode(value: &mut String, max_len: u32, out: &mut Writer) -> Result<(), EncodeError> {
        let found = value.len();
        if found > max_len as usize {
            return Err(EncodeError::new(EncodeProblem::TooLong { found, max: max_len }));
        }
        out.put(value.as_bytes());
        Ok(())
    }

    fn decode(value: &mut String, max_len: u32, input: &mut Reader<'_>) -> Result<(), DecodeError> {
        let (found, max) = (input.left() as u64, u64::from(max_len));
        if found > max {
            return Err(input.error(Problem::TooLong { found, max }));
        }
        let at = input.offset_bytes();
        let text = std::str::from_utf8(input.take_rest());
        text.map_err(|_| DecodeError::new(at, Problem::Text))?.clone_into(value);
        Ok(())
    }
}

impl Value for String {
    type Codec = Text;
}

//! The kinds of values that a stream holds.

use std::fmt;

/// What a field's bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// 0 or 1.
    Bool = 1,
    /// Unsigned, 8 bits.
    U8 = 2,
    /// Unsigned, 16 bits.
    U16 = 3,
    /// Unsigned, 32 bits.
    U32 = 4,
    /// Unsigned, 64 bits.
    U64 = 5,
    /// Unsigned, 128 bits.
    U128 = 6,
    /// Two's complement, 8 bits.
    I8 = 7,
    /// Two's complement, 16 bits.
    I16 = 8,
    /// Two's complement, 32 bits.
    I32 = 9,
    /// Two's complement, 64 bits.
    I64 = 10,
    /// Two's complement, 128 bits.
    I128 = 11,
    /// UTF-8.
    Text = 12,
    /// Values of one kind.
    List = 13,
    /// A value or nothing.
    Option = 14,
    /// Fields and subsections.
    Struct = 15,
    /// One of several variants, and its fields.
    Enum = 16,
    /// A subsection, where a field could be.
    Subsection = 17,
}

impl Kind {
    const ALL: [Self; 17] = [
        Self::Bool,
        Self::U8,
        Self::U16,
        Self::U32,
        Self::U64,
        Self::U128,
        Self::I8,
        Self::I16,
        Self::I32,
        Self::I64,
        Self::I128,
        Self::Text,
        Self::List,
        Self::Option,
        Self::Struct,
        Self::Enum,
        Self::Subsection,
    ];

    /// The kind with that code.
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == code)
    }

    /// Bytes of a value, if all of the kind have the same number.
    pub const fn width_bytes(self) -> Option<usize> {
        match self {
            Self::Bool | Self::U8 | Self::I8 => Some(1),
            Self::U16 | Self::I16 => Some(2),
            Self::U32 | Self::I32 => Some(4),
            Self::U64 | Self::I64 => Some(8),
            Self::U128 | Self::I128 => Some(16),
            Self::Text
            | Self::List
            | Self::Option
            | Self::Struct
            | Self::Enum
            | Self::Subsection => None,
        }
    }

    /// Name, as schemas have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bool => "bool",
            Self::U8 => "u8",
            Self::U16 => "u16",
            Self::U32 => "u32",
            Self::U64 => "u64",
            Self::U128 => "u128",
            Self::I8 => "i8",
            Self::I16 => "i16",
            Self::I32 => "i32",
            Self::I64 => "i64",
            Self::I128 => "i128",
            Self::Text => "text",
            Self::List => "list",
            Self::Option => "option",
            Self::Struct => "struct",
            Self::Enum => "enum",
            Self::Subsection => "subsection",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_found_by_their_codes() {
        for kind in Kind::ALL {
            assert_eq!(Kind::from_code(kind as u8), Some(kind));
        }
        assert_eq!(Kind::from_code(0), None);
        assert_eq!(Kind::from_code(18), None);
    }
}

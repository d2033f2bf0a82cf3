//! Decoding.

use crate::declare::{Codec, DeviceState, Field, Subsection, Variant, Visitor};
use crate::error::{DecodeError, Problem};
use crate::kind::Kind;
use crate::wire::{Reader, expect_kind};

/// Everything of a state but its version, which stands at `at`.
pub(crate) fn decode_body<S: DeviceState>(
    state: &mut S,
    version: u16,
    at: u64,
    input: &mut Reader<'_>,
) -> Result<(), DecodeError> {
    let (oldest, newest) = (S::DECLARED.min_version, S::DECLARED.version);
    if !(oldest..=newest).contains(&version) {
        let problem = Problem::Version { found: version, oldest, newest };
        return Err(DecodeError::new(at, problem));
    }
    let variant = match S::DECLARED.kind {
        Kind::Enum => {
            let at = input.offset_bytes();
            Some(Wanted { tag: input.u16()?, at, found: false })
        }
        _ => None,
    };
    let mut decode = Decode { state, input, version, last_tag: 0, last_subsection: "", variant };
    S::visit(&mut decode)?;
    decode.finish()?;
    let at = input.offset_bytes();
    if input.has_hooks() {
        state
            .post_load()
            .map_err(|cause| DecodeError::new(at, Problem::Hook { hook: "post_load", cause }))?;
    }
    Ok(())
}

/// The variant that the stream holds.
struct Wanted {
    tag: u16,
    at: u64,
    found: bool,
}

struct Decode<'r, 'a, S> {
    state: &'r mut S,
    input: &'r mut Reader<'a>,
    /// The writer's.
    version: u16,
    last_tag: u16,
    last_subsection: &'a str,
    variant: Option<Wanted>,
}

impl<'a, S: DeviceState> Decode<'_, 'a, S> {
    /// Takes fields off the stream up to the one with that tag and name: it, if it is there. `None`
    /// stands for the end of all fields. On the way there is nothing but what was retired.
    fn advance(
        &mut self,
        wanted: Option<(u16, &str)>,
    ) -> Result<Option<(u8, Reader<'a>)>, DecodeError> {
        while let Some(next) = self.input.peek_tag()? {
            if wanted.is_some_and(|(tag, _)| next > tag) {
                break;
            }
            let at = self.input.offset_bytes();
            if next <= self.last_tag || !self.last_subsection.is_empty() {
                return Err(DecodeError::new(at, Problem::Order));
            }
            let field = self.input.field();
            self.last_tag = next;
            if let Some((tag, name)) = wanted
                && tag == next
            {
                let (header, payload) = field.map_err(|error| error.in_field(name))?;
                return Ok(Some((header.kind, payload)));
            }
            field?;
            let is_retired =
                |retired: &crate::Retired| retired.tag == next && self.version <= retired.until;
            if !S::DECLARED.retired.iter().any(is_retired) {
                return Err(DecodeError::new(at, Problem::UnknownField { tag: next }));
            }
        }
        Ok(None)
    }

    /// Nothing may be left.
    fn finish(&mut self) -> Result<(), DecodeError> {
        if let Some(wanted) = self.variant.as_ref().filter(|wanted| !wanted.found) {
            let problem = Problem::UnknownVariant { tag: wanted.tag };
            return Err(DecodeError::new(wanted.at, problem));
        }
        self.advance(None)?;
        if self.input.left() == 0 {
            return Ok(());
        }
        let at = self.input.offset_bytes();
        let (name, _) = self.input.subsection()?;
        Err(self.unknown(name, at))
    }

    fn unknown(&self, name: &str, at: u64) -> DecodeError {
        let problem = if name <= self.last_subsection {
            Problem::Order
        } else {
            Problem::UnknownSubsection { name: name.to_owned() }
        };
        DecodeError::new(at, problem)
    }
}

impl<S: DeviceState> Visitor<S> for Decode<'_, '_, S> {
    type Error = DecodeError;

    fn field<T, C: Codec<T>>(&mut self, field: &Field<S, T>) -> Result<(), DecodeError> {
        let at = self.input.offset_bytes();
        let (since, version) = (field.since, self.version);
        let in_field = |problem| DecodeError::new(at, problem).in_field(field.name);
        let found = self.advance(Some((field.tag, field.name)))?;
        // Fields of other variants are not shown.
        let Some(value) = (field.get)(self.state) else { return Ok(()) };
        match found {
            Some(_) if since > version => Err(in_field(Problem::FieldTooNew { since, version })),
            Some((kind, mut payload)) => expect_kind(C::KIND, kind, at)
                .and_then(|()| C::decode(value, field.max_len, &mut payload))
                .and_then(|()| payload.end())
                .map_err(|error| error.in_field(field.name)),
            None => match field.default {
                Some(default) if since > version => {
                    C::set(value, default());
                    Ok(())
                }
                _ => Err(in_field(Problem::MissingField { tag: field.tag })),
            },
        }
    }

    fn subsection<T: DeviceState>(
        &mut self,
        subsection: &Subsection<S, T>,
    ) -> Result<(), DecodeError> {
        self.advance(None)?;
        let value = (subsection.get)(self.state);
        let at = self.input.offset_bytes();
        let mut ahead = self.input.clone();
        if ahead.left() > 0 {
            let (name, mut payload) = ahead.subsection()?;
            if name < subsection.name {
                return Err(self.unknown(name, at));
            }
            if name == subsection.name {
                *self.input = ahead;
                self.last_subsection = name;
                let at = payload.offset_bytes();
                return payload
                    .u16()
                    .and_then(|version| decode_body(value, version, at, &mut payload))
                    .and_then(|()| payload.end())
                    .map_err(|error| error.in_field(name));
            }
        }
        *value = (subsection.default)();
        Ok(())
    }

    fn variant(
        &mut self,
        variant: &Variant<S>,
        fields: impl FnOnce(&mut Self) -> Result<(), DecodeError>,
    ) -> Result<(), DecodeError> {
        let version = self.version;
        let Some(wanted) = self.variant.as_mut().filter(|wanted| wanted.tag == variant.tag) else {
            return Ok(());
        };
        wanted.found = true;
        let since = variant.since;
        if since > version {
            let problem = Problem::FieldTooNew { since, version };
            return Err(DecodeError::new(wanted.at, problem).in_field(variant.name));
        }
        *self.state = (variant.make)();
        fields(self).map_err(|error| error.in_field(variant.name))
    }
}

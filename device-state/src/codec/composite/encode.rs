//! Encoding.

use crate::declare::{Codec, DeviceState, Field, Subsection, Variant, Visitor};
use crate::error::{EncodeError, EncodeProblem};
use crate::kind::Kind;
use crate::wire::Writer;

/// Everything of a state but its version.
pub(crate) fn encode_body<S: DeviceState>(
    state: &mut S,
    out: &mut Writer,
) -> Result<(), EncodeError> {
    state
        .pre_save()
        .map_err(|cause| EncodeError::new(EncodeProblem::Hook { hook: "pre_save", cause }))?;
    S::visit(&mut Encode { state, out })
}

struct Encode<'a, S> {
    state: &'a mut S,
    out: &'a mut Writer,
}

impl<S: DeviceState> Visitor<S> for Encode<'_, S> {
    type Error = EncodeError;

    fn field<T, C: Codec<T>>(&mut self, field: &Field<S, T>) -> Result<(), EncodeError> {
        // Fields of other variants are not shown.
        let Some(value) = (field.get)(self.state) else { return Ok(()) };
        self.out
            .field(field.tag, C::KIND, |out| C::encode(value, field.max_len, out))
            .map_err(|error| error.in_field(field.name))
    }

    fn subsection<T: DeviceState>(
        &mut self,
        subsection: &Subsection<S, T>,
    ) -> Result<(), EncodeError> {
        if !(subsection.needed)(self.state) {
            return Ok(());
        }
        let value = (subsection.get)(self.state);
        self.out
            .subsection(subsection.name, T::DECLARED.version, |out| encode_body(value, out))
            .map_err(|error| error.in_field(subsection.name))
    }

    fn variant(
        &mut self,
        variant: &Variant<S>,
        fields: impl FnOnce(&mut Self) -> Result<(), EncodeError>,
    ) -> Result<(), EncodeError> {
        if !(variant.is)(self.state) {
            return Ok(());
        }
        debug_assert_eq!(S::DECLARED.kind, Kind::Enum);
        self.out.u16(variant.tag);
        fields(self).map_err(|error| error.in_field(variant.name))
    }
}

//! The schema.

use std::convert::Infallible;

use crate::declare::{Codec, DeviceState, Field, Section, Subsection, Variant, Visitor};
use crate::kind::Kind;
use crate::schema::{
    EnumSchema, FieldSchema, RetiredSchema, Schema, Shape, StructSchema, SubsectionSchema,
    VariantSchema,
};

impl Schema {
    /// With that section, too.
    #[must_use]
    pub fn with<S: Section>(mut self) -> Self {
        self.add(S::NAME, struct_schema::<S>(), None);
        self
    }
}

pub(crate) fn shape<S: DeviceState>() -> Shape {
    match S::DECLARED.kind {
        Kind::Enum => {
            let Described { variants, .. } = describe::<S>();
            let (version, min_version) = (S::DECLARED.version, S::DECLARED.min_version);
            Shape::Enum(EnumSchema { version, min_version, variants })
        }
        _ => Shape::Struct(struct_schema::<S>()),
    }
}

pub(crate) fn struct_schema<S: DeviceState>() -> StructSchema {
    let Described { fields, subsections, .. } = describe::<S>();
    let retired = S::DECLARED.retired.iter();
    StructSchema {
        version: S::DECLARED.version,
        min_version: S::DECLARED.min_version,
        fields,
        subsections,
        retired: retired.map(|r| RetiredSchema { tag: r.tag, until: r.until }).collect(),
    }
}

fn describe<S: DeviceState>() -> Described {
    let mut described = Described::default();
    match S::visit(&mut described) {
        Ok(()) => described,
        Err(never) => match never {},
    }
}

#[derive(Default)]
struct Described {
    fields: Vec<FieldSchema>,
    subsections: Vec<SubsectionSchema>,
    variants: Vec<VariantSchema>,
}

impl<S> Visitor<S> for Described {
    type Error = Infallible;

    fn field<T, C: Codec<T>>(&mut self, field: &Field<S, T>) -> Result<(), Infallible> {
        self.fields.push(FieldSchema {
            tag: field.tag,
            name: field.name.to_owned(),
            since: field.since,
            has_default: field.default.is_some(),
            shape: C::shape(field.max_len),
        });
        Ok(())
    }

    fn subsection<T: DeviceState>(
        &mut self,
        subsection: &Subsection<S, T>,
    ) -> Result<(), Infallible> {
        let (name, state) = (subsection.name.to_owned(), struct_schema::<T>());
        self.subsections.push(SubsectionSchema { name, state });
        Ok(())
    }

    fn variant(
        &mut self,
        variant: &Variant<S>,
        fields: impl FnOnce(&mut Self) -> Result<(), Infallible>,
    ) -> Result<(), Infallible> {
        fields(self)?;
        self.variants.push(VariantSchema {
            tag: variant.tag,
            name: variant.name.to_owned(),
            since: variant.since,
            fields: std::mem::take(&mut self.fields),
        });
        Ok(())
    }
}

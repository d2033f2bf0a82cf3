//! What a registry asks of a device.

use std::mem;

use crate::codec::{Codec, Composite, decode_body, encode_body, struct_schema};

use crate::declare::{DeviceState, Section};
use crate::error::{DecodeError, EncodeError, EncodeProblem, HookError};
use crate::schema::StructSchema;
use crate::stream::RawSection;
use crate::wire::Writer;

/// A device whose state is elsewhere: in the kernel, in another process, behind a lock that is not
/// held for long.
pub trait Component: Send {
    /// What is saved of it.
    type State: Section + Send;

    /// Tells the state. The machine stands still.
    fn save(&mut self) -> Result<Self::State, HookError>;

    /// Whether the device could take this state. Changes nothing. Asked of all devices before the
    /// first one is loaded.
    fn check(&self, state: &Self::State) -> Result<(), HookError> {
        let _ = state;
        Ok(())
    }

    /// Takes the state over.
    fn load(&mut self, state: Self::State) -> Result<(), HookError>;
}

/// What is declared of a section.
#[derive(Debug, Clone, Copy)]
pub(super) struct About {
    pub(super) name: &'static str,
    pub(super) version: u16,
    pub(super) priority: i32,
    pub(super) after: &'static [&'static str],
}

impl About {
    fn of<S: Section>() -> Self {
        Self { name: S::NAME, version: S::DECLARED.version, priority: S::PRIORITY, after: S::AFTER }
    }
}

/// Why a device did not stage a section.
pub(super) enum StageError {
    /// The bytes.
    Decode(DecodeError),
    /// The device.
    Refused(HookError),
}

/// A device of any type.
pub(super) trait Device: Send {
    fn about(&self) -> About;

    fn schema(&self) -> StructSchema;

    /// Appends the payload of its section.
    fn save(&mut self, out: &mut Writer) -> Result<(), EncodeError>;

    /// Decodes a section without changing the device.
    fn stage(&mut self, section: &RawSection<'_>) -> Result<(), StageError>;

    /// Loads the section that was staged last.
    fn commit(&mut self, section: &RawSection<'_>) -> Result<(), HookError>;

    /// Forgets what was staged.
    fn unstage(&mut self);
}

/// A device that is its own state.
pub(super) struct InPlace<'a, S>(pub(super) &'a mut S);

impl<S: Section + Send> Device for InPlace<'_, S> {
    fn about(&self) -> About {
        About::of::<S>()
    }

    fn schema(&self) -> StructSchema {
        struct_schema::<S>()
    }

    fn save(&mut self, out: &mut Writer) -> Result<(), EncodeError> {
        encode_body(self.0, out)
    }

    fn stage(&mut self, section: &RawSection<'_>) -> Result<(), StageError> {
        // Without its hooks: what they look at may be what is not in the stream.
        let mut input = section.payload.without_hooks();
        let mut scratch = <Composite as Codec<S>>::blank();
        decode_body(&mut scratch, section.version, section.offset_bytes, &mut input)
            .map_err(StageError::Decode)
    }

    fn commit(&mut self, section: &RawSection<'_>) -> Result<(), HookError> {
        let mut input = section.payload.clone();
        Ok(decode_body(self.0, section.version, section.offset_bytes, &mut input)?)
    }

    fn unstage(&mut self) {}
}

/// A device whose state is elsewhere.
pub(super) struct Managed<C: Component> {
    component: C,
    staged: Option<C::State>,
}

impl<C: Component> Managed<C> {
    pub(super) fn new(component: C) -> Self {
        Self { component, staged: None }
    }
}

impl<C: Component> Device for Managed<C> {
    fn about(&self) -> About {
        About::of::<C::State>()
    }

    fn schema(&self) -> StructSchema {
        struct_schema::<C::State>()
    }

    fn save(&mut self, out: &mut Writer) -> Result<(), EncodeError> {
        let state = self.component.save();
        let mut state =
            state.map_err(|cause| EncodeError::new(EncodeProblem::Hook { hook: "save", cause }))?;
        encode_body(&mut state, out)
    }

    fn stage(&mut self, section: &RawSection<'_>) -> Result<(), StageError> {
        let mut input = section.payload.clone();
        let mut state = C::State::blank();
        decode_body(&mut state, section.version, section.offset_bytes, &mut input)
            .map_err(StageError::Decode)?;
        self.component.check(&state).map_err(StageError::Refused)?;
        self.staged = Some(state);
        Ok(())
    }

    fn commit(&mut self, _: &RawSection<'_>) -> Result<(), HookError> {
        let staged = mem::take(&mut self.staged);
        self.component.load(staged.ok_or("nothing was staged")?)
    }

    fn unstage(&mut self) {
        self.staged = None;
    }
}

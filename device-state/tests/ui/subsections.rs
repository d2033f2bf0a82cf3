//! Subsections go by their own names.

use pageferry_device_state::DeviceState;

#[derive(DeviceState, Default)]
pub struct Part;

#[derive(DeviceState)]
pub struct State {
    #[device_state(subsection = "part")]
    pub never: Part,
    //~ ERROR a subsection needs `needed`, a function that says when it is sent
    #[device_state(subsection = "other", needed = |_: &State| true, tag = 1)]
    pub tagged: Part,
    //~ ERROR a subsection has no `tag`: it goes by its own name and version
    #[device_state(subsection = "other", needed = |_: &State| true)]
    //~ ERROR subsection `other` is there already
    pub again: Part,
    #[device_state(tag = 2, needed = |_: &State| true)]
    //~ ERROR only a subsection is sent when it is needed
    pub field: u8,
}

#[derive(DeviceState)]
pub enum Choice {
    #[device_state(tag = 1)]
    One {
        #[device_state(subsection = "one", needed = |_: &Choice| true)]
        //~ ERROR only structs have subsections
        part: Part,
    },
}

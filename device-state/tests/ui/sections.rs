//! What has no name is no section.

use pageferry_device_state::{DeviceState, to_bytes};

#[derive(DeviceState)]
pub struct Part;

pub fn save(part: &mut Part) -> Vec<u8> {
    to_bytes(part).unwrap()
    //~ ERROR `Part` is no section
}

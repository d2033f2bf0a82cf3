//! What is skipped is in no stream.

use pageferry_device_state::DeviceState;

#[derive(DeviceState)]
pub struct State {
    #[device_state(skip, tag = 1)]
    pub field: u8,
    //~ ERROR a field that is skipped is not in the stream: `skip` stands alone
}

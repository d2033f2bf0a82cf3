//! What wishes do to a migration under way.

use pageferry::MigrationHandle;

use super::Wish;

/// Whether a wish that comes during a migration is to end it.
pub(crate) fn cancels(wish: &Wish) -> bool {
    matches!(wish, Wish::Interrupt | Wish::Cancel)
}

/// What a wish that comes during a migration does to it.
pub(crate) fn steer(handle: &MigrationHandle, wish: &Wish) {
    match wish {
        Wish::Interrupt | Wish::Cancel => {
            say!("cancelling; the guest stays here unless it is gone already");
            handle.cancel();
        }
        Wish::Limit(limit) => handle.limit_bandwidth(*limit),
        Wish::SwitchoverBandwidth(expected) => handle.set_switchover_bandwidth(*expected),
        Wish::DowntimeLimit(limit) => handle.set_downtime_limit(*limit),
        Wish::DowntimeBound(bound) => handle.set_bound((*bound).into()),
        Wish::NotConverging(policy) => {
            if let Err(error) = handle.set_policy((*policy).into()) {
                say!("{}", error.chain());
            }
        }
        Wish::Channels(channels) => handle.use_channels(*channels),
        Wish::Quit => say!("a migration is under way: cancel it first"),
        Wish::Migrate(_) | Wish::Status | Wish::Check(_) | Wish::Pause | Wish::Resume => {
            say!("a migration is under way");
        }
    }
}

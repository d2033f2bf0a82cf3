//! A guest that runs in one QEMU and is moved to another, and what it shows meanwhile.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use pageferry_cli::outcome::Failure;
use pageferry_qemu::Qmp;
use pageferry_qemu::testing::{Console, Guests, Running, Word};
use pageferry_report::document::ms;

use super::cpu::Cpu;
use super::interrupt::Interrupt;
use super::report::Move;

/// Whole passes that a guest makes before it moves, and after it: of one that was under way then it may have seen
/// little there.
const PASSES: u32 = 2;

/// How long a guest that goes on may give no sign of life.
const PATIENCE: Duration = Duration::from_secs(60);

/// Somebody who moves guests.
pub(super) trait Mover {
    fn name(&self) -> String;

    /// Moves it, and measures between what takes time only because this is a measurement.
    fn go(&self, stage: &Stage) -> Result<Moved, Failure>;
}

/// What a mover says, and where the guest is.
pub(super) struct Moved {
    pub(super) total_ms: f64,
    pub(super) downtime_ms: f64,
    pub(super) wire_bytes: u64,
    pub(super) cpu_ms: f64,
    /// Its QEMU, which ends with this.
    pub(super) _there: Running,
}

/// A guest at the source, and the names of both hosts.
pub(super) struct Stage<'g> {
    pub(super) guests: &'g Guests,
    pub(super) qmp: Arc<Qmp>,
    pub(super) pid: u32,
    pub(super) here: String,
    pub(super) there: String,
}

impl Stage<'_> {
    /// CPU time from now on of this process and both QEMUs.
    pub(super) fn cpu(&self, there: &Qmp) -> Result<Cpu, Failure> {
        Cpu::begin(&[&self.qmp, there])
    }
}

/// Boots a guest and has it moved. Whoever interrupts that ends the guest, and so whatever waits for it.
pub(super) fn play(
    guests: &Guests,
    who: &dyn Mover,
    number: usize,
    interrupt: &Interrupt,
) -> Result<Move, Failure> {
    let [here, there] = ["a", "b"].map(|side| format!("{side}{number}"));
    let mut near = Console::of(guests, &here);
    let mut far = Console::of(guests, &there);
    let source = Running::start(guests, &here)?;
    let watch = interrupt.ends(source.child.id());
    let qmp = Arc::new(source.connect()?);
    let before = listen(&mut near, Some(PASSES))?;
    before.right("before it was moved")?;
    let stage = Stage { guests, qmp, pid: source.child.id(), here, there };
    let (moved, here, there) = thread::scope(|scope| {
        let here = scope.spawn(|| listen(&mut near, None));
        let there = scope.spawn(|| listen(&mut far, Some(PASSES)));
        let moved = who.go(&stage);
        if moved.is_err() {
            // Nobody comes: who listens hears an end.
            let _ = UnixStream::connect(guests.path(&format!("{}.console", stage.there)));
        }
        let there = there.join().map_err(|_| "who listened to the guest panicked")?;
        drop(watch);
        drop(source);
        let here = here.join().map_err(|_| "who listened to the guest panicked")?;
        Ok::<_, Failure>((moved, here, there))
    })?;
    for host in [&stage.here, &stage.there] {
        for path in guests.ram_files(host) {
            // It may not have come to be.
            let _ = std::fs::remove_file(path);
        }
    }
    let (moved, here, there) = (moved?, here?, there?);
    let oracle_ok = there.wrong.is_none() && there.passes >= PASSES;
    let last = here.last.or(before.last).ok_or("the guest showed no life before it was moved")?;
    // A guest that is wrong may never show life again.
    let standstill_ms = there.first.map(|first| ms(first.duration_since(last)));
    let Moved { total_ms, downtime_ms, wire_bytes, cpu_ms, .. } = moved;
    Ok(Move { total_ms, downtime_ms, standstill_ms, wire_bytes, cpu_ms, oracle_ok })
}

/// What a guest showed on one host.
struct Shown {
    first: Option<Instant>,
    last: Option<Instant>,
    passes: u32,
    wrong: Option<String>,
}

impl Shown {
    fn right(&self, when: &str) -> Result<(), Failure> {
        match &self.wrong {
            Some(wrong) => Err(format!("the guest was wrong {when}: {wrong}").into()),
            None if self.passes < PASSES => Err(format!("QEMU ended {when}").into()),
            None => Ok(()),
        }
    }
}

/// Until so many whole passes and a sign of life, an error or the end of QEMU.
fn listen(console: &mut Console, passes: Option<u32>) -> Result<Shown, Failure> {
    let mut shown = Shown { first: None, last: None, passes: 0, wrong: None };
    let began = Instant::now();
    let enough = |shown: &Shown, passes| {
        // Two passes may be over before the process that gives signs of life has its turn.
        shown.passes >= passes && (shown.first.is_some() || began.elapsed() > PATIENCE)
    };
    while passes.is_none_or(|passes| !enough(&shown, passes)) {
        match console.hear()? {
            None => break,
            Some(Word::Beat) => {
                let now = Instant::now();
                shown.first.get_or_insert(now);
                shown.last = Some(now);
            }
            Some(Word::Pass { process, .. }) => shown.passes += u32::from(process == "memory"),
            Some(Word::Wrong(wrong)) => {
                shown.wrong = Some(wrong);
                break;
            }
            Some(_) => {}
        }
    }
    Ok(shown)
}

//! `receive`: waits for a guest, and runs it.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crossbeam_channel::{Receiver, select_biased, unbounded};
use pageferry::memory::GuestMemory;
use pageferry::{Offer, Statistics};
use pageferry_cli::arrival::Reception;
use pageferry_cli::outcome::{Failure, Outcome};
use pageferry_cli::report::{GuestAt, Report};
use pageferry_cli::room;
use pageferry_cli::say;
use pageferry_cli::wishes::{Wish, listen_to_signals, wait_or_quit};
use pageferry_qemu::ram::{self, Made, RamError};
use pageferry_qemu::record::{Record, RecordFile, Recorded, Standing};
use pageferry_qemu::{QemuCommand, QemuDestination, Vm};
use pageferry_tcp::ZeroCopy;
use rustix::fs::{Access, access};

use crate::args::ReceiveArgs;

pub(crate) fn receive(args: &ReceiveArgs) -> Result<Outcome, Failure> {
    let (wishes_in, wishes) = unbounded();
    listen_to_signals(wishes_in)?;
    let observers = args.observers.open()?;
    let chosen = args.transport.choose(args.link.tcp(ZeroCopy::default()), &args.rdma)?;
    let transport = chosen.name();
    let reception =
        Reception { link: &args.link, pin: &args.pin, populate: 0, observers: &observers };
    let monitor = monitor(args);
    check_free(args, &monitor)?;
    check_program(args.qemu.first().ok_or("no QEMU is given")?)?;
    let home = |offer: &Offer| home_for(args, &monitor, offer);
    let arrival = match reception.await_guest(chosen, &args.listen, &wishes, home)? {
        Ok(arrival) => arrival,
        Err(why) => {
            say!("{why}");
            let (ended, nothing) = (Outcome::Cancelled, Statistics::default());
            let mut report = Report::new(ended, GuestAt::Source, transport, 0, 0, &nothing);
            report.error = Some(why);
            report.print(args.json)?;
            return Ok(ended);
        }
    };
    let mut report = arrival.report();
    report.guest = Some("qemu".to_owned());
    report.print(args.json)?;
    match arrival.result {
        Ok(arrived) => {
            let Recorded { machine, file, .. } = arrived.machine;
            if let Err(error) = file.remove() {
                say!("the guest runs here; {error}");
            }
            run_on(machine, &wishes)?;
        }
        Err(_) if report.guest_at == GuestAt::Source => {}
        Err(_) => {
            say!("the copy is kept, paused; Ctrl-C destroys it");
            wait_or_quit(&wishes, None);
        }
    }
    Ok(report.outcome)
}

/// Where the guest's QEMU gets a monitor.
fn monitor(args: &ReceiveArgs) -> PathBuf {
    let beside_ram = || {
        let mut path = args.ram.first().cloned().unwrap_or_default().into_os_string();
        path.push(".qmp");
        path.into()
    };
    args.qmp.clone().unwrap_or_else(beside_ram)
}

/// Whether all that is to be made can be: nothing of another guest's is there.
fn check_free(args: &ReceiveArgs, monitor: &Path) -> Result<(), Failure> {
    if let Some(path) = args.ram.iter().find(|path| path.exists()) {
        return Err(RamError::Exists { path: path.clone() }.into());
    }
    let path = monitor.display();
    match UnixStream::connect(monitor) {
        Ok(_) => Err(format!("{path} is another QEMU's monitor: name another one by --qmp").into()),
        // Of a QEMU that is gone.
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused && is_socket(monitor) => {
            Ok(())
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(format!("{path} cannot be a monitor's socket ({error})").into()),
    }
}

/// Whether there is such a program, before a guest comes for it. It is not tried: a script of the user's could start a
/// guest.
fn check_program(program: &OsStr) -> Result<(), Failure> {
    let path = Path::new(program);
    let is_there = |path: &Path| path.is_file() && access(path, Access::EXEC_OK).is_ok();
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let found = if path.components().count() > 1 {
        is_there(path)
    } else {
        std::env::split_paths(&folders).any(|folder| is_there(&folder.join(path)))
    };
    if found { Ok(()) } else { Err(format!("there is no program {}", path.display()).into()) }
}

fn is_socket(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|file| file.file_type().is_socket())
}

/// RAM and a QEMU for the guest that is offered.
fn home_for(
    args: &ReceiveArgs,
    monitor: &Path,
    offer: &Offer,
) -> Result<(Recorded<QemuDestination>, Arc<GuestMemory>), Failure> {
    let theirs: Vm = serde_json::from_slice(offer.description())
        .map_err(|error| format!("the source's description of its QEMU makes no sense: {error}"))?;
    if args.ram.len() != theirs.ram.len() {
        let (theirs, here) = (theirs.ram.len(), args.ram.len());
        let why = format!("the source's RAM is in {theirs} files, and --ram names {here} here");
        return Err(why.into());
    }
    room::check(offer.layout().len_bytes(), None)?;
    let [program, arguments @ ..] = &*args.qemu else { return Err("no QEMU is given".into()) };
    let mut arguments = arguments.to_vec();
    arguments.extend(["-qmp".into(), listening_at(monitor)?]);
    let command = QemuCommand { program: program.into(), arguments };
    // Somebody may have come meanwhile.
    check_free(args, monitor)?;
    let mut made = Made::create(&args.ram)?;
    // Not before: files that are somebody else's must not stand there.
    let record = Record::new(Standing::Awaited, None, args.ram.clone());
    let record = RecordFile::create(monitor, record)?;
    made.removes_too(monitor);
    let mut machine = QemuDestination::start(command, made)?;
    let found = ram::backends_of(machine.qmp().ok_or("QEMU is gone")?)?;
    if found.iter().any(|(_, path)| !args.ram.contains(path)) {
        return Err("QEMU's RAM is not in the files that --ram names".into());
    }
    let memory = machine.map(&found)?;
    let qmp = machine.qmp().ok_or("QEMU is gone")?;
    Vm::of(qmp, found.into_iter().map(|(backend, _)| backend).collect())?.check_takes(&theirs)?;
    Ok((Recorded::destination(machine, record), memory))
}

/// QEMU's argument for a monitor that listens there.
fn listening_at(monitor: &Path) -> Result<OsString, Failure> {
    // Options of QEMU's end at a comma, unless it is doubled.
    let path = monitor.to_str().ok_or("the path of --qmp is no text")?.replace(',', ",,");
    Ok(format!("unix:{path},server=on,wait=off").into())
}

/// Stays as long as the guest runs, or until told to go.
fn run_on(machine: QemuDestination, wishes: &Receiver<Wish>) -> Result<(), Failure> {
    let (mut child, _qmp) = machine.keep().ok_or("QEMU is gone")?;
    say!("the guest runs here, in process {}; Ctrl-C leaves it running", child.id());
    let (gone_in, gone) = unbounded();
    std::thread::Builder::new().name("child".into()).spawn(move || {
        // Nobody may be waiting any more.
        let _ = gone_in.send(child.wait());
    })?;
    loop {
        select_biased! {
            recv(gone) -> ended => {
                say!("QEMU has ended ({})", ended??);
                return Ok(());
            },
            recv(wishes) -> wish => if matches!(wish?, Wish::Interrupt | Wish::Quit) {
                return Ok(());
            },
        }
    }
}

//! What guests are made of.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::boot::{Kernel, initramfs};

/// The program.
pub const QEMU: &str = "qemu-system-x86_64";

/// The only program of a guest's Linux.
const INIT: &str = include_str!("init.c");

/// A guest without Linux.
const BARE: &str = include_str!("bare.c");

/// A disk of a guest.
#[derive(Debug, Clone)]
pub struct Disk {
    /// Its file.
    pub path: PathBuf,
    /// Whether QEMU reads and writes it past the page cache.
    pub direct: bool,
}

/// What guests are made of: a kernel, and an initramfs with one program, which writes and checks its memory; or that
/// alone.
#[derive(Debug)]
pub struct Guests {
    folder: tempfile::TempDir,
    kernel: PathBuf,
    /// Linux has one.
    initramfs: Option<PathBuf>,
    /// What runs it: `tcg`, or `kvm`.
    pub accelerator: &'static str,
    /// Pages that the guest writes, over and over.
    pub pages: u32,
    /// Microseconds that it rests after each MiB that it has written. What it does all the time takes CPU time from
    /// whoever moves it.
    pub rest_us: u32,
    /// Steps of work that it does for each page. A guest that has half of a CPU then writes half as fast.
    pub work: u32,
    /// Virtual CPUs. With more than one another process writes half as many pages.
    pub vcpus: u8,
    /// Names and sizes, in MiB, of what its RAM is made of: a NUMA node each, if it is not one alone.
    pub ram: Vec<(&'static str, u32)>,
    /// Which is written and read all the time, if there is one.
    pub disk: Option<Disk>,
    /// Whether another process says every millisecond that it lives.
    pub beats: bool,
}

impl Guests {
    /// With Linux, of 256 MiB and one virtual CPU, that write so many pages. Says so, and why, if there can be none
    /// here.
    pub fn build(pages: u32) -> Option<Self> {
        or_skipped(Self::try_build(pages))
    }

    /// The same, with the reason if there can be none.
    pub fn try_build(pages: u32) -> Result<Self, String> {
        let kernel =
            Kernel::find().ok_or("there is no kernel for a guest (`ci/lab install` gets one)")?;
        let mut guests = Self::of(pages, kernel.image.clone())?;
        let init = guests.compile("init", INIT, &["-static"])?;
        let program = std::fs::read(&init).map_err(|error| error.to_string())?;
        let path = guests.path("initrd");
        std::fs::write(&path, initramfs(&program, &kernel.modules()))
            .map_err(|error| error.to_string())?;
        guests.initramfs = Some(path);
        Ok(guests)
    }

    /// Without Linux, which are there at once: they have neither a disk nor beats nor rests, and use one virtual CPU.
    /// Says so, and why, if there can be none here.
    pub fn bare(pages: u32) -> Option<Self> {
        // A program that needs nothing but a CPU: neither a library nor what a loader or a debugger would look for.
        const OPTIONS: [&str; 12] = [
            "-m32",
            "-ffreestanding",
            "-nostdlib",
            "-static",
            "-fno-pie",
            "-no-pie",
            "-fno-stack-protector",
            "-fcf-protection=none",
            "-fno-asynchronous-unwind-tables",
            "-mgeneral-regs-only",
            "-Wl,-Ttext=0x100000",
            "-Wl,--nmagic,--build-id=none",
        ];
        let build = || {
            let mut guests = Self::of(pages, PathBuf::new())?;
            guests.kernel = guests.compile("bare", BARE, &OPTIONS)?;
            Ok(guests)
        };
        or_skipped(build())
    }

    fn of(pages: u32, kernel: PathBuf) -> Result<Self, String> {
        qemu_version()?;
        // RAM is here, and so is its console.
        let folder = tempfile::tempdir_in("/dev/shm").map_err(|error| error.to_string())?;
        Ok(Self {
            folder,
            kernel,
            initramfs: None,
            accelerator: "tcg",
            pages,
            rest_us: 1000,
            work: 0,
            vcpus: 1,
            ram: vec![("ram", 256)],
            disk: None,
            beats: false,
        })
    }

    /// Where the program is, of that name.
    fn compile(&self, name: &str, source: &str, options: &[&str]) -> Result<PathBuf, String> {
        let program = self.path(name);
        let file = self.path(&format!("{name}.c"));
        std::fs::write(&file, source).map_err(|error| error.to_string())?;
        let compiled = Command::new("cc")
            .args(["-O2", "-o"])
            .arg(&program)
            .args(options)
            .arg(file)
            .output()
            .map_err(|error| format!("there is no C compiler ({error})"))?;
        if compiled.status.success() {
            Ok(program)
        } else {
            Err(format!("{name}.c: {}", String::from_utf8_lossy(&compiled.stderr)))
        }
    }

    /// Of a file of theirs, in a folder that goes with them.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The files of its RAM on a host of that name.
    pub fn ram_files(&self, host: &str) -> Vec<PathBuf> {
        self.ram.iter().map(|(id, _)| self.path(&format!("{host}.{id}"))).collect()
    }

    /// QEMU's arguments for the guest on a host of that name; at NAME.console it is listened to.
    pub fn arguments(&self, host: &str) -> Vec<OsString> {
        let joined = |text: &str, path: &Path, rest: &str| {
            let mut all = OsString::from(text);
            all.push(path);
            all.push(rest);
            all
        };
        let file = |kind: &str| self.path(&format!("{host}.{kind}"));
        let console = joined("socket,id=console,path=", &file("console"), "");
        let Self { pages, rest_us, work, .. } = self;
        let [disk, beats] = [self.disk.is_some(), self.beats].map(u8::from);
        let kernel =
            "console=ttyS0 quiet panic=-1 mitigations=off cryptomgr.notests nokaslr audit=0";
        let init = format!("pages={pages} rest={rest_us} work={work} disk={disk} beats={beats}");
        let command_line = format!("{kernel} {init}");
        // A KVM that is not all of one says that it has a register which it does not let be written.
        let cpu = if self.accelerator == "kvm" { "max,-arch-capabilities" } else { "max" };
        let mut arguments: Vec<OsString> = [
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-accel",
            self.accelerator,
            "-cpu",
            cpu,
            "-serial",
            "chardev:console",
            "-no-reboot",
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        ]
        .map(OsString::from)
        .into();
        arguments.extend(["-chardev".into(), console, "-m".into()]);
        let mebibytes: u32 = self.ram.iter().map(|(_, mebibytes)| mebibytes).sum();
        arguments.extend([format!("{mebibytes}M").into(), "-machine".into()]);
        match &*self.ram {
            [(id, _)] => arguments.push(format!("q35,memory-backend={id}").into()),
            nodes => {
                arguments.push("q35".into());
                let nodes = nodes.iter().map(|(id, _)| format!("node,memdev={id}"));
                arguments.extend(nodes.flat_map(|node| ["-numa".into(), node.into()]));
            }
        }
        for ((id, mebibytes), path) in self.ram.iter().zip(self.ram_files(host)) {
            let backend =
                format!("memory-backend-file,id={id},size={mebibytes}M,share=on,mem-path=");
            arguments.extend(["-object".into(), joined(&backend, &path, "")]);
        }
        arguments.extend(["-kernel".into(), self.kernel.clone().into()]);
        if let Some(initramfs) = &self.initramfs {
            arguments.extend(["-initrd".into(), initramfs.into()]);
        }
        arguments.extend(["-append".into(), command_line.into()]);
        arguments.extend(["-smp".into(), self.vcpus.to_string().into()]);
        if let Some(Disk { path, direct }) = &self.disk {
            let cache = if *direct { "on" } else { "off" };
            let node = format!("driver=file,node-name=disk0,cache.direct={cache},filename=");
            arguments.extend(["-blockdev".into(), joined(&node, path, "")]);
            arguments.extend(["-device".into(), "virtio-blk-pci,drive=disk0".into()]);
        }
        arguments
    }
}

fn or_skipped(guests: Result<Guests, String>) -> Option<Guests> {
    if let Err(why) = &guests {
        eprintln!("skipped, because {why}");
    }
    guests.ok()
}

/// The version of QEMU, as that says it, or why there is none.
pub fn qemu_version() -> Result<String, String> {
    let said = Command::new(QEMU).arg("--version").output();
    let said = said.map_err(|error| format!("there is no {QEMU} ({error})"))?;
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    let version = said.split(' ').skip_while(|word| *word != "version").nth(1);
    Ok(version.unwrap_or_default().to_owned())
}

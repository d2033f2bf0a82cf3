//! Machines of several devices.

use std::error::Error;
use std::sync::{Arc, Mutex};

use pageferry_device_state::schema::Verdict;
use pageferry_device_state::{
    Component, DecodeError, DeviceState, HookError, LoadError, OrderError, RegisterError, Registry,
    SaveError, StreamWriter, sections, to_bytes,
};

#[derive(DeviceState, Debug, Clone, Default, PartialEq)]
#[device_state(name = "clock", after = "cpu")]
struct Clock {
    #[device_state(tag = 1)]
    ticks: u64,
}

#[derive(DeviceState, Debug, Clone, Default, PartialEq)]
#[device_state(name = "cpu", priority = 5, post_load = Cpu::check)]
struct Cpu {
    #[device_state(tag = 1)]
    pc: u64,
    #[device_state(skip)]
    refuses: bool,
}

impl Cpu {
    fn check(&mut self) -> Result<(), &'static str> {
        if self.refuses { Err("not today") } else { Ok(()) }
    }
}

#[derive(DeviceState, Debug, Clone, Default, PartialEq)]
#[device_state(name = "disk", priority = -1)]
struct Disk {
    #[device_state(tag = 1, max_len = 100)]
    queue: Vec<u32>,
}

/// A part whose state is elsewhere, and what became of it.
struct Part {
    state: Arc<Mutex<Disk>>,
    log: Arc<Mutex<Vec<String>>>,
    refuses: bool,
    fails: bool,
}

impl Part {
    fn new(queue: &[u32]) -> Self {
        let state = Arc::new(Mutex::new(Disk { queue: queue.to_vec() }));
        Self { state, log: Arc::default(), refuses: false, fails: false }
    }
}

impl Component for Part {
    type State = Disk;

    fn save(&mut self) -> Result<Disk, HookError> {
        if self.fails { Err("no disk".into()) } else { Ok(self.state.lock().unwrap().clone()) }
    }

    fn check(&self, state: &Disk) -> Result<(), HookError> {
        self.log.lock().unwrap().push(format!("check {}", state.queue.len()));
        if self.refuses { Err("too much".into()) } else { Ok(()) }
    }

    fn load(&mut self, state: Disk) -> Result<(), HookError> {
        self.log.lock().unwrap().push(format!("load {}", state.queue.len()));
        if self.fails {
            return Err("no disk".into());
        }
        *self.state.lock().unwrap() = state;
        Ok(())
    }
}

/// A machine of two CPUs, a clock and a disk.
struct Machine {
    cpus: [Cpu; 2],
    clock: Clock,
    disk: Arc<Mutex<Disk>>,
    log: Arc<Mutex<Vec<String>>>,
    part: Option<Part>,
}

impl Machine {
    fn new(seed: u32) -> Self {
        let part = Part::new(&[seed, seed + 1]);
        let cpu = |n: u32| Cpu { pc: u64::from(seed * 10 + n), refuses: false };
        let (disk, log) = (Arc::clone(&part.state), Arc::clone(&part.log));
        let clock = Clock { ticks: u64::from(seed) };
        Self { cpus: [cpu(0), cpu(1)], clock, disk, log, part: Some(part) }
    }

    fn registry(&mut self) -> Registry<'_> {
        let mut registry = Registry::new();
        registry.add(0, &mut self.clock).unwrap();
        registry.add_component(0, self.part.take().expect("one registry")).unwrap();
        // Not in the order of their instances.
        for (instance, cpu) in [0, 1].into_iter().zip(&mut self.cpus).rev() {
            registry.add(instance, cpu).unwrap();
        }
        registry
    }

    fn contents(&self) -> String {
        format!("{:?} {:?} {:?}", self.cpus, self.clock, self.disk)
    }
}

fn saved(seed: u32) -> Vec<u8> {
    Machine::new(seed).registry().save().unwrap()
}

#[test]
fn a_machine_moves() {
    let (mut old, mut new) = (Machine::new(3), Machine::new(8));
    let stream = old.registry().save().unwrap();
    new.registry().load(&stream).unwrap();
    assert_eq!(new.contents(), old.contents());
    assert_eq!(*new.log.lock().unwrap(), ["check 2", "load 2"]);
    let names: Vec<_> =
        sections(&stream).unwrap().iter().map(|s| (s.name.to_owned(), s.instance)).collect();
    // By priority, and the clock after the CPUs although its priority is higher than the disk's.
    let expected = [("cpu", 0), ("cpu", 1), ("clock", 0), ("disk", 0)];
    assert_eq!(names, expected.map(|(name, instance)| (name.to_owned(), instance)));
}

#[test]
fn threads_save_the_same_stream() {
    for threads in [0, 1, 2, 3, 9] {
        let stream = Machine::new(3).registry().save_by_threads(threads).unwrap();
        assert_eq!(stream, saved(3), "{threads} threads");
    }
    let mut failing = Machine::new(3);
    failing.part.as_mut().unwrap().fails = true;
    let error = failing.registry().save_by_threads(4).unwrap_err();
    assert!(matches!(error, SaveError::Device(_)), "{error}");
}

#[test]
fn saving_appends_or_leaves_what_was_there() {
    let mut bytes = b"before".to_vec();
    Machine::new(3).registry().save_to(&mut bytes).unwrap();
    assert_eq!(bytes, [b"before", saved(3).as_slice()].concat());
    let mut failing = Machine::new(3);
    failing.part.as_mut().unwrap().fails = true;
    let mut bytes = b"before".to_vec();
    let error = failing.registry().save_to(&mut bytes).unwrap_err();
    assert_eq!(error.source().unwrap().to_string(), "section disk 0, save failed");
    assert_eq!(bytes, b"before");
}

#[test]
fn a_section_that_fails_is_not_in_the_stream() {
    let mut writer = StreamWriter::new();
    writer.state(0, &mut Clock { ticks: 1 }).unwrap();
    let mut disk = Disk { queue: vec![0; 101] };
    assert!(writer.state(0, &mut disk).is_err());
    writer.state(1, &mut Clock { ticks: 2 }).unwrap();
    let stream = writer.finish();
    let clocks: Vec<Clock> =
        sections(&stream).unwrap().iter().map(|section| section.state().unwrap()).collect();
    assert_eq!(clocks, [Clock { ticks: 1 }, Clock { ticks: 2 }]);
}

#[test]
fn duplicates_are_refused() {
    let (mut one, mut other) = (Clock::default(), Clock::default());
    let mut registry = Registry::new();
    registry.add(0, &mut one).unwrap();
    let error = registry.add(0, &mut other).unwrap_err();
    assert_eq!(error, RegisterError::Duplicate { name: "clock", instance: 0 });
    assert_eq!(format!("{registry:?}"), r#"[("clock", 0)]"#);
}

/// Loads into a machine that must stay as it is.
fn refused(stream: &[u8], prepare: impl FnOnce(&mut Machine)) -> LoadError {
    let mut machine = Machine::new(8);
    prepare(&mut machine);
    let before = machine.contents();
    let error = machine.registry().load(stream).unwrap_err();
    assert!(!error.is_half_loaded(), "{error}");
    assert_eq!(machine.contents(), before, "{error}");
    assert!(!machine.log.lock().unwrap().iter().any(|line| line.starts_with("load")), "{error}");
    error
}

#[test]
fn a_machine_that_is_refused_its_state_is_as_it_was() {
    let good = saved(3);
    let damaged = |at: usize| {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        bytes
    };
    for at in 0..good.len() {
        let error = refused(&damaged(at), |_| ());
        assert!(matches!(error, LoadError::Decode(_)), "{at}: {error}");
    }
    // Without the disk, and with one device more.
    let mut without = StreamWriter::new();
    for section in sections(&good).unwrap().iter().filter(|section| section.name != "disk") {
        copy(section, section.instance, &mut without);
    }
    let error = refused(&without.finish(), |_| ());
    assert!(matches!(error, LoadError::Missing { name: "disk", instance: 0 }), "{error}");
    let mut with = StreamWriter::new();
    for section in &sections(&good).unwrap() {
        copy(section, section.instance, &mut with);
    }
    copy(&sections(&good).unwrap()[0], 7, &mut with);
    let error = refused(&with.finish(), |_| ());
    assert!(matches!(error, LoadError::Unknown { instance: 7, .. }), "{error}");
    let error = refused(&good, |machine| machine.part.as_mut().unwrap().refuses = true);
    assert!(matches!(error, LoadError::Refused { name: "disk", .. }), "{error}");
}

fn copy(section: &pageferry_device_state::RawSection<'_>, instance: u32, to: &mut StreamWriter) {
    let mut payload = section.payload.clone();
    let bytes = payload.take(payload.left()).unwrap();
    to.section(section.name, instance, section.version, |out| {
        out.put(bytes);
        Ok(())
    })
    .unwrap();
}

#[test]
fn a_machine_that_fails_half_way_says_so_and_can_be_loaded_again() {
    let mut machine = Machine::new(8);
    machine.cpus[1].refuses = true;
    let mut registry = machine.registry();
    let error = registry.load(&saved(3)).unwrap_err();
    let LoadError::HalfLoaded { name: "cpu", instance: 1, loaded: 1, cause } = &error else {
        panic!("{error}");
    };
    // Its hook, behind the decoder's error.
    let decoding = cause.downcast_ref::<DecodeError>().expect("the decoder's error");
    assert_eq!(decoding.source().unwrap().to_string(), "not today");
    assert!(error.is_half_loaded());
    drop(registry);
    let part = Part::new(&[8, 9]);
    (machine.disk, machine.log) = (Arc::clone(&part.state), Arc::clone(&part.log));
    machine.part = Some(part);
    machine.cpus[1].refuses = false;
    machine.registry().load(&saved(3)).unwrap();
    assert_eq!(machine.cpus[1].pc, 31);
}

#[derive(DeviceState, Default)]
#[device_state(name = "hen", after = "egg")]
struct Hen {
    #[device_state(tag = 1)]
    age: u8,
}

#[derive(DeviceState, Default)]
#[device_state(name = "egg", after = "hen", after = "never-there")]
struct Egg {
    #[device_state(tag = 1)]
    age: u8,
}

#[test]
fn what_waits_for_each_other_has_no_order() {
    let (mut hen, mut egg) = (Hen::default(), Egg::default());
    let mut registry = Registry::new();
    registry.add(0, &mut hen).unwrap();
    // Alone it does not wait for what is not there.
    registry.save().unwrap();
    registry.add(0, &mut egg).unwrap();
    let error = registry.save().unwrap_err();
    let cycle = OrderError::Cycle { names: vec!["egg", "hen"] };
    assert!(matches!(&error, SaveError::Order(found) if *found == cycle), "{error:?}");
    let error = registry.load(&[]).unwrap_err();
    assert!(matches!(&error, LoadError::Order(found) if *found == cycle), "{error:?}");
}

#[test]
fn the_schema_of_a_machine_has_its_instances() {
    let schema = Machine::new(0).registry().schema();
    assert_eq!(schema.section("cpu").unwrap().instances, [1, 0]);
    let mut clock = Clock::default();
    let mut smaller = Registry::new();
    smaller.add(0, &mut clock).unwrap();
    assert_eq!(smaller.schema().reads(&schema).verdict(), Verdict::Fails);
    assert_eq!(schema.reads(&schema).verdict(), Verdict::Works);
}

#[test]
fn an_empty_machine_has_a_stream_too() {
    let stream = Registry::new().save().unwrap();
    Registry::new().load(&stream).unwrap();
    let error = Registry::new().load(&to_bytes(&mut Clock::default()).unwrap()).unwrap_err();
    assert!(matches!(error, LoadError::Unknown { .. }), "{error}");
}

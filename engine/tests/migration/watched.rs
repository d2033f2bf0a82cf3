//! A migration is watched from outside: by snapshots, and by the spans of its phases.

use std::num::NonZeroU64;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use pageferry::dirty::DirtySources;
use pageferry::testing::memory_transport;
use pageferry::transport::OneLink;
use pageferry::{Destination, Phase, Snapshot};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id};
use tracing::{Level, Metadata, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;

use crate::scene::Scene;
use crate::support::{Refuse, SharedLog, SoftwareLog, TestMachine};

/// Snapshots of both sides, some thousand, until both have ended.
fn watched(scene: Scene) -> [Vec<Snapshot>; 2] {
    let handles = [scene.source.handle(), scene.destination.handle()];
    thread::scope(|scope| {
        let watching = handles.map(|handle| {
            scope.spawn(move || {
                let mut seen = vec![handle.snapshot()];
                while seen.last().is_some_and(|last| last.phase != Phase::Ended) {
                    thread::yield_now();
                    let next = handle.snapshot();
                    if seen.last().is_some_and(|last| differs(last, &next)) {
                        seen.push(next);
                    }
                }
                seen
            })
        });
        scene.play(|link| link).expect_moved();
        watching.map(|seen| seen.join().expect("a watcher"))
    })
}

fn differs(before: &Snapshot, then: &Snapshot) -> bool {
    let mut before = before.clone();
    before.elapsed = then.elapsed;
    before != *then
}

#[test]
fn counters_grow_and_what_is_left_shrinks() {
    let scene = Scene::new();
    // So that there is something to see on a busy machine too.
    scene.source.handle().limit_bandwidth(NonZeroU64::new(16 << 20));
    let [source, destination] = watched(scene);
    for seen in [&source, &destination] {
        for pair in seen.windows(2) {
            let [before, then] = pair else { unreachable!("two") };
            assert!(then.elapsed >= before.elapsed && then.round >= before.round, "{pair:?}");
            assert!(then.landed_bytes >= before.landed_bytes, "{pair:?}");
            assert!(then.wire_bytes >= before.wire_bytes, "{pair:?}");
            assert!(then.pages.total() >= before.pages.total(), "{pair:?}");
            assert!(then.left_pages <= then.round_pages, "{then:?}");
            let same_round = then.round == before.round && then.round_pages == before.round_pages;
            assert!(!same_round || then.left_pages <= before.left_pages, "{pair:?}");
        }
        let last = seen.last().expect("the end");
        assert!(last.channels.len() > 1 && last.channels.iter().all(|channel| !channel.lost));
        let of_channels = last.channels.iter().map(|channel| channel.landed_bytes).sum::<u64>();
        assert_eq!(of_channels, last.landed_bytes);
        let rates = last.bytes_per_second_since(&seen[0]);
        assert_eq!(rates.len(), last.channels.len());
        assert!(rates.iter().sum::<f64>() > 0.0, "{rates:?}");
    }
    let last = source.last().expect("the end");
    assert_eq!(last.left_pages, 0, "{last:?}");
    assert!(last.expected_downtime > Some(Duration::ZERO), "{last:?}");
    assert!(last.bytes_per_second > 0.0 && last.dirty_pages_per_second > 0.0, "{last:?}");
    assert!(source.iter().any(|seen| seen.left_pages > 0 && seen.left_pages < seen.round_pages));
}

/// Also one that came to nothing: nobody polls for ever.
#[test]
fn whatever_becomes_of_it_it_ends() {
    let broken = |spoil: fn(Scene) -> Scene| {
        let scene = spoil(Scene::new());
        let handles = [scene.source.handle(), scene.destination.handle()];
        let outcome = scene.play(|link| link);
        assert!(outcome.source.is_err());
        assert_eq!(handles.map(|handle| handle.snapshot().phase), [Phase::Ended; 2]);
    };
    broken(|mut scene| {
        scene.source = scene.source.channels(0);
        scene
    });
    broken(|scene| {
        scene.source.handle().cancel();
        scene
    });
    broken(|mut scene| {
        scene.destination_refuses = Refuse::Schema;
        scene
    });

    // Who connected, and was not wanted.
    let (source_link, destination_link) = memory_transport::pair();
    let destination = Destination::new();
    let handle = destination.handle();
    let scene = Scene::new();
    thread::scope(|scope| {
        scope.spawn(|| {
            let offer = destination
                .negotiate(OneLink::destination(Box::new(destination_link)))
                .expect("an offer");
            assert_eq!(handle.snapshot().phase, Phase::Setup);
            drop(offer);
            assert_eq!(handle.snapshot().phase, Phase::Ended);
        });
        let log = SoftwareLog::new(&scene.here);
        let machine = TestMachine::new(&scene.here, &log, 1, 1);
        let dirty = DirtySources::new(vec![Box::new(SharedLog(log))]);
        let link = Box::new(source_link);
        scene
            .source
            .migrate(machine, scene.here.memory(), dirty, OneLink::source(link))
            .expect_err("refused");
    });
}

/// Who stands in whom, of spans: `migration(source) > round(1)`.
#[derive(Clone, Default)]
struct Heard(Arc<Mutex<Vec<String>>>);

struct Named(String);

impl Visit for Named {
    fn record_debug(&mut self, _field: &Field, value: &dyn std::fmt::Debug) {
        self.0 = format!("{}({value:?})", self.0);
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Heard {
    fn enabled(&self, metadata: &Metadata<'_>, _: Context<'_, S>) -> bool {
        metadata.is_span() && *metadata.level() == Level::INFO
    }

    fn on_new_span(&self, span: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut name = Named(span.metadata().name().to_owned());
        span.record(&mut name);
        let span = context.span(id).expect("a span");
        let name = match span.parent() {
            Some(parent) => {
                let extensions = parent.extensions();
                format!("{} > {}", extensions.get::<Named>().expect("named").0, name.0)
            }
            None => name.0,
        };
        self.0.lock().unwrap().push(name.clone());
        span.extensions_mut().insert(Named(name));
    }
}

#[test]
fn each_phase_is_a_span() {
    let heard = Heard::default();
    let subscriber = tracing_subscriber::registry().with(heard.clone());
    tracing::subscriber::with_default(subscriber, || {
        Scene::new().play(|link| link).expect_moved();
    });
    let heard = heard.0.lock().unwrap();
    let of = |side: &str| {
        let whose = format!("migration(\"{side}\")");
        let inside = format!("{whose} > ");
        assert_eq!(heard.iter().filter(|name| **name == whose).count(), 1, "{heard:?}");
        heard.iter().filter_map(|name| Some(name.strip_prefix(&inside)?.to_owned())).collect()
    };
    let source: Vec<_> = of("source");
    assert_eq!(source[..2], ["setup", "round(1)"], "{source:?}");
    let last = source.len() - 2;
    assert!(source[last].starts_with("switchover("), "{source:?}");
    assert_eq!(source[last + 1], format!("{} > commit", source[last]));
    let destination: Vec<_> = of("destination");
    assert_eq!(destination[..2], ["setup", "pages"], "{destination:?}");
    let last = destination.len() - 2;
    assert!(destination[last].starts_with("switchover("), "{destination:?}");
    assert_eq!(destination[last + 1], format!("{} > commit", destination[last]));
}

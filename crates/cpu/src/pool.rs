//! A pool of pinned threads that run one function together and meet at barriers.
//!
//! A forward pass of a small model is a few hundred phases of a few microseconds, so threads spin
//! between phases instead of sleeping. Between calls of [`Pool::run`] they spin for a short while
//! and then park, so that an idle engine costs nothing. The caller is thread 0. Every spin of a
//! barrier is bounded by the work of the slowest thread; a panic in one thread aborts the process,
//! because the others would wait for it for ever.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{JoinHandle, Thread};

use model::heartbeat::Heartbeat;

/// Spins before a waiting worker parks: about 50 microseconds, longer than the host needs between
/// two steps of a stream.
const SPINS_BEFORE_PARK: u32 = 20_000;
/// Spins of a barrier before the thread lets others run: more threads than cores would otherwise
/// wait out whole time slices.
const SPINS_BEFORE_YIELD: u32 = 2_000;

/// Threads that work together.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<(Thread, Option<JoinHandle<()>>)>,
}

struct Shared {
    threads: usize,
    /// Counts calls of `run`; a worker starts when it changes.
    epoch: AtomicU32,
    /// The function of this epoch: a `&dyn Fn(Team)` as two words.
    job: [AtomicUsize; 2],
    /// Workers that have finished this epoch.
    done: AtomicUsize,
    parked: Vec<AtomicBool>,
    barrier: Barrier,
    stop: AtomicBool,
    heartbeat: OnceLock<Arc<Heartbeat>>,
}

/// A barrier that is reused without being reset.
struct Barrier {
    arrived: AtomicUsize,
    generation: AtomicU32,
}

/// What a thread knows of the others during [`Pool::run`].
#[derive(Clone, Copy)]
pub struct Team<'a> {
    /// This thread, `0..threads`.
    pub thread: usize,
    /// Threads in all.
    pub threads: usize,
    shared: &'a Shared,
}

impl Team<'_> {
    /// Waits until every thread is here. What they wrote before is visible after.
    pub fn barrier(&self) {
        if self.threads == 1 {
            return;
        }
        let barrier = &self.shared.barrier;
        let generation = barrier.generation.load(Ordering::Relaxed);
        if barrier.arrived.fetch_add(1, Ordering::AcqRel) + 1 == self.threads {
            barrier.arrived.store(0, Ordering::Relaxed);
            barrier
                .generation
                .store(generation.wrapping_add(1), Ordering::Release);
            return;
        }
        let mut spins = 0;
        while barrier.generation.load(Ordering::Acquire) == generation {
            spin(&mut spins);
        }
    }

    /// Shows that the computation goes on: a phase that another thread never finishes shows nothing, because
    /// thread 0 waits for it at the barrier.
    pub fn alive(&self) {
        if self.thread == 0
            && let Some(heartbeat) = self.shared.heartbeat.get()
        {
            heartbeat.beat();
        }
    }

    /// This thread's contiguous share of `count` pieces of work.
    #[must_use]
    pub fn share(&self, count: usize) -> std::ops::Range<usize> {
        count * self.thread / self.threads..count * (self.thread + 1) / self.threads
    }
}

fn spin(spins: &mut u32) {
    *spins += 1;
    if *spins < SPINS_BEFORE_YIELD {
        std::hint::spin_loop();
    } else {
        std::thread::yield_now();
    }
}

impl Pool {
    /// A pool of `threads`, the caller included; workers are pinned to cores where the system says
    /// which there are and there are enough.
    #[must_use]
    pub fn new(threads: usize) -> Self {
        let threads = threads.max(1);
        let shared = Arc::new(Shared {
            threads,
            epoch: AtomicU32::new(0),
            job: [AtomicUsize::new(0), AtomicUsize::new(0)],
            done: AtomicUsize::new(0),
            parked: (0..threads).map(|_| AtomicBool::new(false)).collect(),
            barrier: Barrier {
                arrived: AtomicUsize::new(0),
                generation: AtomicU32::new(0),
            },
            stop: AtomicBool::new(false),
            heartbeat: OnceLock::new(),
        });
        let cores = core_affinity::get_core_ids().unwrap_or_default();
        let pinned = cores.len() >= threads;
        let workers = (1..threads)
            .map(|thread| {
                let core = cores.get(thread).copied().filter(|_| pinned);
                let shared = Arc::clone(&shared);
                let handle = std::thread::Builder::new()
                    .name(format!("kilotok-cpu-{thread}"))
                    .spawn(move || {
                        if let Some(core) = core {
                            core_affinity::set_for_current(core);
                        }
                        work(&shared, thread);
                    })
                    .expect("the system can start a thread");
                (handle.thread().clone(), Some(handle))
            })
            .collect();
        Self { shared, workers }
    }

    /// What [`Team::alive`] beats from now on; only the first counts.
    pub fn watch(&self, heartbeat: &Arc<Heartbeat>) {
        let _ = self.shared.heartbeat.set(Arc::clone(heartbeat));
    }

    /// Threads, the caller included.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.shared.threads
    }

    /// Runs `job` on every thread and returns when all have finished.
    pub fn run(&self, job: &(dyn Fn(Team<'_>) + Sync)) {
        let shared = &*self.shared;
        let team = Team {
            thread: 0,
            threads: shared.threads,
            shared,
        };
        if shared.threads == 1 {
            return job(team);
        }
        // SAFETY: a fat reference is two words; it is turned back into one by `work`, and used only
        // until `done` says that every worker has finished, which this call waits for.
        let words: [usize; 2] = unsafe { std::mem::transmute(job) };
        shared.job[0].store(words[0], Ordering::Relaxed);
        shared.job[1].store(words[1], Ordering::Relaxed);
        shared.done.store(0, Ordering::Relaxed);
        shared.epoch.fetch_add(1, Ordering::SeqCst);
        for (thread, (handle, _)) in (1..).zip(&self.workers) {
            if shared.parked[thread].load(Ordering::SeqCst) {
                handle.unpark();
            }
        }
        let abort = AbortOnPanic;
        job(team);
        std::mem::forget(abort);
        let mut spins = 0;
        while shared.done.load(Ordering::Acquire) + 1 < shared.threads {
            spin(&mut spins);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.epoch.fetch_add(1, Ordering::SeqCst);
        for (thread, handle) in &mut self.workers {
            thread.unpark();
            if let Some(handle) = handle.take() {
                let _ = handle.join();
            }
        }
    }
}

/// Cores that this process may use.
pub(crate) fn physical_cores() -> usize {
    core_affinity::get_core_ids().map_or(1, |cores| cores.len())
}

struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        // Reached only while unwinding: the other threads wait at a barrier for this one.
        eprintln!("kilotok: a compute thread failed; see the message above");
        std::process::abort();
    }
}

fn work(shared: &Shared, thread: usize) {
    let mut seen = 0;
    loop {
        seen = wait(shared, thread, seen);
        if shared.stop.load(Ordering::SeqCst) {
            return;
        }
        let words = [
            shared.job[0].load(Ordering::Relaxed),
            shared.job[1].load(Ordering::Relaxed),
        ];
        // SAFETY: `run` stored these words from a reference that lives until `done` is complete,
        // and published them with the epoch that `wait` acquired.
        let job: &(dyn Fn(Team<'_>) + Sync) = unsafe { std::mem::transmute(words) };
        let abort = AbortOnPanic;
        job(Team {
            thread,
            threads: shared.threads,
            shared,
        });
        std::mem::forget(abort);
        shared.done.fetch_add(1, Ordering::AcqRel);
    }
}

/// Waits for an epoch other than `seen` and returns it.
fn wait(shared: &Shared, thread: usize, seen: u32) -> u32 {
    for _ in 0..SPINS_BEFORE_PARK {
        let epoch = shared.epoch.load(Ordering::Acquire);
        if epoch != seen {
            return epoch;
        }
        std::hint::spin_loop();
    }
    loop {
        // Said before the epoch is read again, both in one total order with `run`'s: either this
        // thread sees the new epoch or `run` sees that it has to be woken.
        shared.parked[thread].store(true, Ordering::SeqCst);
        let epoch = shared.epoch.load(Ordering::SeqCst);
        if epoch != seen {
            shared.parked[thread].store(false, Ordering::SeqCst);
            return epoch;
        }
        std::thread::park();
        shared.parked[thread].store(false, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_see_what_the_others_wrote() {
        for threads in [1, 2, 3, 5] {
            let pool = Pool::new(threads);
            let counters: Vec<AtomicUsize> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
            for round in 1..=200 {
                pool.run(&|team| {
                    for phase in 1..=3 {
                        counters[team.thread].fetch_add(1, Ordering::Relaxed);
                        team.barrier();
                        for counter in &counters {
                            let wanted = (round - 1) * 3 + phase;
                            assert_eq!(counter.load(Ordering::Relaxed), wanted);
                        }
                        team.barrier();
                    }
                });
            }
        }
    }

    #[test]
    fn shares_cover_all_work_once() {
        let pool = Pool::new(3);
        for count in [0, 1, 2, 3, 7, 100] {
            let seen: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
            pool.run(&|team| {
                for i in team.share(count) {
                    seen[i].fetch_add(1, Ordering::Relaxed);
                }
            });
            assert!(seen.iter().all(|n| n.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn wakes_after_parking() {
        let pool = Pool::new(2);
        let ran = AtomicUsize::new(0);
        for _ in 0..3 {
            std::thread::sleep(std::time::Duration::from_millis(5));
            pool.run(&|_| {
                ran.fetch_add(1, Ordering::Relaxed);
            });
        }
        assert_eq!(ran.load(Ordering::Relaxed), 6);
    }
}

//! A private thread pool, and the order in which a call's tasks run on it.
//!
//! A call borrows a *team*: the calling thread and as many helpers as it asked for. Helpers spin for
//! a moment after their work, then park. Teams belong to a process id: a forked child, whose helpers
//! do not exist, starts teams of its own.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a helper looks for the next call before it parks.
const SPIN: Duration = Duration::from_micros(50);

/// A stage of a schedule: equal tasks that may run side by side.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Stage {
    /// Number of tasks.
    pub tasks: usize,
    /// Earlier stages that must have ended before any of these tasks starts.
    pub after: [Option<usize>; 3],
}

/// Runs the tasks of all stages on up to `threads` threads: `make` gives each thread its worker, a
/// function of stage and task.
///
/// Tasks are claimed in order, and a task waits for the stages that it names; these come earlier, so
/// the claim order cannot deadlock. No result may depend on which thread runs a task.
pub(crate) fn run<W: FnMut(usize, usize)>(
    threads: usize,
    stages: &[Stage],
    make: impl Fn(usize) -> W + Sync,
) {
    let total: usize = stages.iter().map(|stage| stage.tasks).sum();
    if threads <= 1 || total <= 1 {
        let mut worker = make(0);
        for (stage, Stage { tasks, .. }) in stages.iter().enumerate() {
            (0..*tasks).for_each(|task| worker(stage, task));
        }
        return;
    }
    let board = Board {
        stages,
        next: AtomicUsize::new(0),
        done: stages.iter().map(|_| AtomicUsize::new(0)).collect(),
        failed: AtomicBool::new(false),
    };
    broadcast(threads.min(total), &|thread| {
        let result = catch_unwind(AssertUnwindSafe(|| board.work(make(thread))));
        if let Err(panic) = result {
            board.failed.store(true, Ordering::Relaxed);
            resume_unwind(panic);
        }
    });
}

/// Progress of one call.
struct Board<'a> {
    stages: &'a [Stage],
    next: AtomicUsize,
    done: Vec<AtomicUsize>,
    failed: AtomicBool,
}

impl Board<'_> {
    fn work(&self, mut worker: impl FnMut(usize, usize)) {
        let (mut stage, mut first) = (0, 0);
        loop {
            let ticket = self.next.fetch_add(1, Ordering::Relaxed);
            while stage < self.stages.len() && ticket - first >= self.stages[stage].tasks {
                first += self.stages[stage].tasks;
                stage += 1;
            }
            if stage == self.stages.len() {
                return;
            }
            for before in self.stages[stage].after.into_iter().flatten() {
                self.wait(before);
            }
            worker(stage, ticket - first);
            self.done[stage].fetch_add(1, Ordering::Release);
        }
    }

    fn wait(&self, stage: usize) {
        let mut spins = 0u32;
        while self.done[stage].load(Ordering::Acquire) < self.stages[stage].tasks {
            assert!(!self.failed.load(Ordering::Relaxed), "another thread of this call panicked");
            spins += 1;
            // With more threads than cores, the one that is waited for needs this core.
            if spins.is_multiple_of(1024) {
                std::thread::yield_now()
            } else {
                std::hint::spin_loop()
            }
        }
    }
}

/// What helpers run: a closure of the calling thread, borrowed until all of them are done with it.
#[derive(Clone, Copy)]
struct Job(*const (dyn Fn(usize) + Sync));

// SAFETY: the closure is `Sync`, and `Team::run` outlives every use of it.
unsafe impl Send for Job {}

/// State that a team's helpers share with the caller.
struct Shared {
    slot: Mutex<Slot>,
    wake: Condvar,
    /// Number of jobs given out, to be watched while spinning.
    round: AtomicUsize,
    /// Helpers still at work on the current job.
    busy: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

struct Slot {
    job: Option<Job>,
    /// Threads that take part in the current job, the caller included.
    threads: usize,
    round: usize,
}

/// The helpers of one call at a time.
struct Team {
    shared: Arc<Shared>,
    helpers: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Team {
    fn new() -> Self {
        let slot = Mutex::new(Slot { job: None, threads: 0, round: 0 });
        let shared = Shared {
            slot,
            wake: Condvar::new(),
            round: AtomicUsize::new(0),
            busy: AtomicUsize::new(0),
            panic: Mutex::new(None),
        };
        Self { shared: Arc::new(shared), helpers: 0 }
    }

    fn run(&mut self, threads: usize, job: &(dyn Fn(usize) + Sync)) {
        while self.helpers + 1 < threads {
            let (shared, number) = (Arc::clone(&self.shared), self.helpers + 1);
            let builder = std::thread::Builder::new().name(format!("logitless-{number}"));
            let round = lock(&self.shared.slot).round;
            // Fewer helpers only make the call slower.
            if builder.spawn(move || help(&shared, number, round)).is_err() {
                break;
            }
            self.helpers += 1;
        }
        let threads = threads.min(self.helpers + 1);
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes; this function returns after the last helper is done.
        let job: &'static (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(job) };
        {
            let mut slot = lock(&shared.slot);
            slot.job = Some(Job(job));
            slot.threads = threads;
            slot.round += 1;
            shared.busy.store(threads - 1, Ordering::Relaxed);
            shared.round.store(slot.round, Ordering::Release);
        }
        shared.wake.notify_all();
        let own = catch_unwind(AssertUnwindSafe(|| job(0)));
        let mut spins = 0u32;
        while shared.busy.load(Ordering::Acquire) > 0 {
            spins += 1;
            if spins.is_multiple_of(1024) {
                std::thread::yield_now()
            } else {
                std::hint::spin_loop()
            }
        }
        lock(&shared.slot).job = None;
        let theirs = lock(&shared.panic).take();
        if let Some(panic) = own.err().or(theirs) {
            resume_unwind(panic);
        }
    }
}

/// The life of a helper.
fn help(shared: &Shared, number: usize, mut seen: usize) {
    loop {
        let started = Instant::now();
        while shared.round.load(Ordering::Acquire) == seen && started.elapsed() < SPIN {
            std::hint::spin_loop();
        }
        let job = {
            let mut slot = lock(&shared.slot);
            while slot.round == seen {
                slot = shared.wake.wait(slot).unwrap_or_else(PoisonError::into_inner);
            }
            seen = slot.round;
            if number < slot.threads { slot.job } else { None }
        };
        if let Some(Job(job)) = job {
            // SAFETY: the caller keeps the closure alive until `busy` is back at zero.
            let work = || unsafe { (*job)(number) };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(work)) {
                *lock(&shared.panic) = Some(panic);
            }
            shared.busy.fetch_sub(1, Ordering::Release);
        }
    }
}

/// The idle teams of one process.
struct Registry {
    process: u32,
    idle: Mutex<Vec<Team>>,
}

static REGISTRY: AtomicPtr<Registry> = AtomicPtr::new(std::ptr::null_mut());

/// The registry of this process. That of a forked parent is left alone: its locks may be held by
/// threads that do not exist here.
fn registry() -> &'static Registry {
    let process = std::process::id();
    let current = REGISTRY.load(Ordering::Acquire);
    // SAFETY: registries are leaked, so a pointer once published stays valid.
    if let Some(registry) = unsafe { current.as_ref() }
        && registry.process == process
    {
        return registry;
    }
    let fresh = Box::into_raw(Box::new(Registry { process, idle: Mutex::new(Vec::new()) }));
    match REGISTRY.compare_exchange(current, fresh, Ordering::AcqRel, Ordering::Acquire) {
        // SAFETY: just leaked, never freed.
        Ok(_) => unsafe { &*fresh },
        Err(_) => registry(),
    }
}

/// Runs `job(thread)` on `threads` threads, the caller being thread 0.
fn broadcast(threads: usize, job: &(dyn Fn(usize) + Sync)) {
    let registry = registry();
    let mut team = lock(&registry.idle).pop().unwrap_or_else(Team::new);
    let result = catch_unwind(AssertUnwindSafe(|| team.run(threads, job)));
    lock(&registry.idle).push(team);
    if let Err(panic) = result {
        resume_unwind(panic);
    }
}

static DEFAULT: AtomicUsize = AtomicUsize::new(0);

/// Sets how many threads a call uses that asks for 0; 0 restores the default.
pub fn set_num_threads(threads: usize) {
    DEFAULT.store(threads, Ordering::Relaxed);
}

/// How many threads a call uses that asks for 0: what was set, else `LOGITLESS_NUM_THREADS`, else the
/// cores that this process may use.
pub fn get_num_threads() -> usize {
    let set = DEFAULT.load(Ordering::Relaxed);
    if set > 0 {
        return set;
    }
    let variable = std::env::var("LOGITLESS_NUM_THREADS").ok().and_then(|text| text.parse().ok());
    let threads = variable
        .filter(|&threads| threads > 0)
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    DEFAULT.store(threads, Ordering::Relaxed);
    threads
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_wait_for_what_they_name() {
        let stages = [
            Stage { tasks: 7, after: [None; 3] },
            Stage { tasks: 5, after: [Some(0), None, None] },
            Stage { tasks: 3, after: [Some(1), None, None] },
        ];
        for threads in [1, 2, 5] {
            let ended = [const { AtomicUsize::new(0) }; 3];
            run(threads, &stages, |_| {
                |stage: usize, _: usize| {
                    if stage > 0 {
                        assert_eq!(
                            ended[stage - 1].load(Ordering::SeqCst),
                            stages[stage - 1].tasks
                        );
                    }
                    ended[stage].fetch_add(1, Ordering::SeqCst);
                }
            });
            assert_eq!(ended.map(|n| n.into_inner()), [7, 5, 3]);
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_survives() {
        let stages = [Stage { tasks: 8, ..Stage::default() }];
        let result = catch_unwind(|| {
            run(3, &stages, |_| |_: usize, task: usize| assert_ne!(task, 5));
        });
        assert!(result.is_err());
        let count = AtomicUsize::new(0);
        run(3, &stages, |_| {
            |_: usize, _: usize| {
                count.fetch_add(1, Ordering::Relaxed);
            }
        });
        assert_eq!(count.into_inner(), 8);
    }
}

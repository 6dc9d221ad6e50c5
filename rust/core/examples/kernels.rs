//! Rates of the kernels alone, on one thread: `cargo run --release --example kernels [rows features classes]`.
//!
//! The three products at the engine's blocking, then the packers. The engine adds the statistics, the exponentials and
//! the memory traffic between blocks; what it loses against these numbers is its own doing.
#![allow(dead_code, clippy::needless_range_loop)]

#[path = "../src/element.rs"]
mod element;
#[path = "../src/kernel/mod.rs"]
mod kernel;

use kernel::vector::Vector;
use kernel::{Block, Gather, Kernel, LANES, Product};
use std::time::Instant;

/// Classes of a block, features of a block of K, rows of a block of K.
const CLASSES: usize = 126;
const FEATURES: usize = 512;

/// Sizes of the problem.
#[derive(Clone, Copy)]
struct Shape {
    rows: usize,
    features: usize,
    classes: usize,
}

/// Best time of a few runs, in seconds.
fn time(mut run: impl FnMut()) -> f64 {
    let once = |run: &mut dyn FnMut()| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    };
    let first = once(&mut run);
    let repeats = (0.2 / first).clamp(2.0, 1000.0) as usize;
    (0..repeats).map(|_| once(&mut run)).fold(first, f64::min)
}

/// A zeroed buffer that starts on a page.
struct Buffer<T> {
    data: Vec<T>,
    skip: usize,
}

impl<T: Copy + Default> Buffer<T> {
    fn new(len: usize) -> Self {
        let page = 4096 / size_of::<T>();
        let data = vec![T::default(); len + page];
        let skip = data.as_ptr().align_offset(4096);
        Self { data, skip }
    }

    fn at(&mut self, index: usize) -> *mut T {
        &mut self.data[self.skip + index]
    }
}

/// GF/s of `z = W Eᵀ`: blocks of classes, panels of rows inside.
fn logits<K: Kernel>(kernel: K, shape: Shape) -> f64 {
    let Shape { rows, features, classes } = shape;
    // Rows a multiple of 4 KiB apart would share one set of the first-level cache.
    let w_row = features + 64 / size_of::<K::Operand>();
    let mut w = Buffer::<K::Operand>::new(classes * w_row);
    let mut e = Buffer::<K::Operand>::new(rows * features);
    let mut z = Buffer::<K::Acc>::new(CLASSES * LANES);
    let seconds = time(|| {
        for class in (0..classes).step_by(CLASSES) {
            for panel in 0..rows / LANES {
                for from in (0..features).step_by(FEATURES) {
                    let product = Product {
                        m: CLASSES.min(classes - class),
                        pieces: 1,
                        k: FEATURES.min(features - from),
                        a: w.at(class * w_row + from),
                        a_row: w_row,
                        a_k: 1,
                        a_piece: 0,
                        b: e.at((panel * features + from) * LANES),
                        c: z.at(0),
                        c_row: LANES,
                        accumulate: from > 0,
                    };
                    // SAFETY: the buffers hold the whole problem.
                    unsafe { kernel.product(&product) };
                }
            }
        }
    });
    2e-9 * (rows * features * classes) as f64 / seconds
}

/// GF/s of `dW = dzᵀ E` for one block of classes, K in blocks of `depth` panels.
fn weight<K: Kernel>(kernel: K, shape: Shape, depth: usize) -> f64 {
    let Shape { rows, features, .. } = shape;
    let (m, panel_step) = (CLASSES, (CLASSES + 3) * LANES);
    let panels = rows / LANES;
    let mut dz = Buffer::<K::Operand>::new(panels * panel_step);
    let mut e = Buffer::<K::Operand>::new(rows * features);
    let mut c = Buffer::<K::Acc>::new(m * LANES);
    let seconds = time(|| {
        for strip in 0..features / LANES {
            for panel in (0..panels).step_by(depth) {
                let product = Product {
                    m,
                    pieces: depth.min(panels - panel),
                    k: LANES,
                    a: dz.at(panel * panel_step),
                    a_row: LANES,
                    a_k: 1,
                    a_piece: panel_step,
                    b: e.at((strip * rows + panel * LANES) * LANES),
                    c: c.at(0),
                    c_row: LANES,
                    accumulate: panel > 0,
                };
                // SAFETY: the buffers hold the whole problem.
                unsafe { kernel.product(&product) };
            }
        }
    });
    2e-9 * (rows * features * m) as f64 / seconds
}

/// GF/s of `dEᵀ += Wᵀ dz` for blocks of `k` classes.
fn input<K: Kernel>(kernel: K, shape: Shape, k: usize) -> f64 {
    let Shape { rows, features, .. } = shape;
    let w_row = if K::COLUMN_A { features + 16 } else { k + 32 };
    let mut w = Buffer::<K::Operand>::new((features + k) * w_row.max(k));
    let mut dz = Buffer::<K::Operand>::new(rows * (k + 2));
    let mut c = Buffer::<K::Acc>::new(rows * features);
    let (a_row, a_k) = if K::COLUMN_A { (1, w_row) } else { (w_row, 1) };
    let seconds = time(|| {
        for panel in 0..rows / LANES {
            let product = Product {
                m: features,
                pieces: 1,
                k,
                a: w.at(0),
                a_row,
                a_k,
                a_piece: 0,
                b: dz.at(panel * LANES * (k + 2)),
                c: c.at(panel * LANES * features),
                c_row: LANES,
                accumulate: true,
            };
            // SAFETY: the buffers hold the whole problem.
            unsafe { kernel.product(&product) };
        }
    });
    2e-9 * (rows * features * k) as f64 / seconds
}

/// Nanoseconds an element: panel, strip, rows, then columns and gradient tile where the kernel has them.
fn packing<K: Kernel>(kernel: K, features: usize) -> Vec<f64> {
    let mut source = Buffer::<K::Element>::new(CLASSES * features);
    let mut out = Buffer::<K::Operand>::new((CLASSES + 160) * (features + 160));
    let start = std::array::from_fn(|i| source.at(i * features).cast_const());
    let panel = Gather { start, count: LANES, step: 1, len: features };
    let strip = Gather { len: LANES, ..panel };
    let (rows, cols) = (CLASSES, features);
    let block = Block { start: start[0], rows, cols, row: features as isize, col: 1 };
    // SAFETY: the buffers hold what each packer reads and writes, padding included.
    let mut times = unsafe {
        vec![
            time(|| kernel.pack_panel(&panel, out.at(0))) / (LANES * features) as f64,
            time(|| kernel.pack_strip(&strip, out.at(0))) / (LANES * LANES) as f64,
            time(|| kernel.pack_rows(&block, out.at(0), features + 32)) / (rows * cols) as f64,
        ]
    };
    if !K::COLUMN_A {
        let mut dz = Buffer::<K::Acc>::new(CLASSES * LANES);
        let mut pairs = Buffer::<K::Operand>::new((CLASSES + 2) * LANES);
        // SAFETY: as above.
        unsafe {
            times.push(time(|| kernel.pack_columns(&block, out.at(0), 160)) / (rows * cols) as f64);
            let seconds = time(|| kernel.store_dz(dz.at(0), CLASSES, out.at(0), pairs.at(0)));
            times.push(seconds / (CLASSES * LANES) as f64);
        }
    }
    times.iter().map(|seconds| seconds * 1e9).collect()
}

/// One line of the table.
fn report<K: Kernel>(name: &str, kernel: K, shape: Shape) {
    // K of the tiles must be a multiple of their step.
    let k = CLASSES.next_multiple_of(K::K_STEP.max(2));
    kernel.begin_thread();
    print!("{name:<16} z {:4.0} | ", logits(kernel, shape));
    print!("dW {:4.0} {:4.0} | ", weight(kernel, shape, 8), weight(kernel, shape, 16));
    print!(
        "dE {:4.0} {:4.0} {:4.0}",
        input(kernel, shape, k),
        input(kernel, shape, 256),
        input(kernel, shape, 512)
    );
    kernel.end_thread();
    let packing: Vec<_> =
        packing(kernel, shape.features).iter().map(|x| format!("{x:.3}")).collect();
    println!(" | {}", packing.join(" "));
}

fn main() {
    let sizes: Vec<usize> = std::env::args().skip(1).filter_map(|size| size.parse().ok()).collect();
    let [rows, features, classes] = sizes[..].try_into().unwrap_or([1024, 512, 8192]);
    let shape = Shape { rows, features, classes };
    println!("N={rows} D={features} V={classes}, one thread, best of several");
    println!(
        "GF/s: z | dW with K in blocks of 8, 16 panels | dE with K = {CLASSES}, 256, 512 classes"
    );
    println!("ns an element: panel strip rows [columns dz]");
    let half = Shape { classes: classes / 4, ..shape };
    report("portable f32", Vector::<f32, _>::new(kernel::isa::Portable), half);
    report("portable f64", Vector::<f64, _>::new(kernel::isa::Portable), half);
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(isa) = kernel::isa::Avx2::detect() {
            report("avx2 f32", Vector::<f32, _>::new(isa), shape);
            report("avx2 f64", Vector::<f64, _>::new(isa), half);
        }
        if let Some(isa) = kernel::isa::Avx512::detect() {
            report("avx512 f32", Vector::<f32, _>::new(isa), shape);
            report("avx512 f64", Vector::<f64, _>::new(isa), half);
            report("avx512 f16", Vector::<half::f16, _>::new(isa), half);
        }
        if let Some(kernel) = kernel::bf16::Avx512Bf16::detect() {
            report("avx512bf16 bf16", kernel, shape);
        }
        if let Some(kernel) = kernel::amx::Amx::detect() {
            report("amx bf16", kernel, shape);
        }
    }
}

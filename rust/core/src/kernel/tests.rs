//! Every kernel that this machine can run, through its own packers, against sums in f64.
//!
//! Sources are embedded in nan: a packer that reads beside its block, or padding that is not zero, shows.
use super::{Block, Gather, Kernel, LANES, Product};
use crate::element::{Element, Real};

/// Runs `$check` on every kernel of this machine.
macro_rules! every_kernel {
    ($check:ident) => {{
        use super::{isa, vector::Vector};
        use half::{bf16, f16};
        macro_rules! level {
            ($isa:expr) => {
                $check(Vector::<f32, _>::new($isa));
                $check(Vector::<f64, _>::new($isa));
                $check(Vector::<bf16, _>::new($isa));
                $check(Vector::<f16, _>::new($isa));
            };
        }
        level!(isa::Portable);
        #[cfg(target_arch = "x86_64")]
        {
            if let Some(isa) = isa::Avx2::detect() {
                level!(isa);
            }
            if let Some(isa) = isa::Avx512::detect() {
                level!(isa);
            }
            if let Some(kernel) = super::bf16::Avx512Bf16::detect() {
                $check(kernel);
            }
            if let Some(kernel) = super::amx::Amx::detect() {
                $check(kernel);
            }
        }
    }};
}

/// xorshift, uniform in [-1, 1).
struct Random(u64);

impl Random {
    fn next(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }
}

/// A matrix in nan: `rows x cols`, element steps `(row, col)`, either sign.
struct Matrix<E> {
    data: Vec<E>,
    first: usize,
    rows: usize,
    cols: usize,
    row: isize,
    col: isize,
}

impl<E: Element> Matrix<E> {
    fn random(rows: usize, cols: usize, (row, col): (isize, isize), random: &mut Random) -> Self {
        let span = |n: usize, step: isize| (n - 1) * step.unsigned_abs();
        let start = |n: usize, step: isize| if step < 0 { span(n, step) } else { 0 };
        let nan = E::narrow(E::Acc::from_f64(f64::NAN));
        let data = vec![nan; span(rows, row) + span(cols, col) + 1];
        let first = start(rows, row) + start(cols, col);
        let mut matrix = Self { data, first, rows, cols, row, col };
        for i in 0..rows {
            for j in 0..cols {
                let index = matrix.index(i, j);
                matrix.data[index] = E::narrow(E::Acc::from_f64(random.next()));
            }
        }
        matrix
    }

    fn index(&self, i: usize, j: usize) -> usize {
        (self.first as isize + i as isize * self.row + j as isize * self.col) as usize
    }

    fn get(&self, i: usize, j: usize) -> f64 {
        self.data[self.index(i, j)].widen().to_f64()
    }

    fn pointer(&self, i: usize, j: usize) -> *const E {
        &self.data[self.index(i, j)]
    }

    fn block(&self) -> Block<E> {
        let (rows, cols, row, col) = (self.rows, self.cols, self.row, self.col);
        Block { start: self.pointer(0, 0), rows, cols, row, col }
    }

    /// Rows `first .. first + 32` as far as there are any, columns `from .. from + len`.
    fn gather(&self, first: usize, from: usize, len: usize) -> Gather<E> {
        let count = (self.rows - first).min(LANES);
        let start = std::array::from_fn(|i| self.pointer(first + i.min(count - 1), from));
        Gather { start, count, step: self.col, len }
    }
}

/// C inside a guard: one row more than the product may touch, rows `c_row` apart.
struct Output<A> {
    data: Vec<A>,
    m: usize,
    c_row: usize,
    before: f64,
}

impl<A: Real> Output<A> {
    fn new(m: usize, c_row: usize, before: f64) -> Self {
        Self { data: vec![A::from_f64(before); (m + 1) * c_row], m, c_row, before }
    }

    /// Compares with `exact(row, lane) -> (sum, sum of magnitudes)`.
    fn check(&self, what: &str, terms: usize, exact: impl Fn(usize, usize) -> (f64, f64)) {
        let unit = if size_of::<A>() == 8 { 2f64.powi(-53) } else { 2f64.powi(-24) };
        for (at, value) in self.data.iter().enumerate() {
            let (i, l) = (at / self.c_row, at % self.c_row);
            let value = value.to_f64();
            if i == self.m || l >= LANES {
                assert_eq!(value, self.before, "{what}: wrote outside C at ({i}, {l})");
                continue;
            }
            let (sum, size) = exact(i, l);
            let bound = unit * (terms as f64 + 2.0) * (size + 1.0);
            assert!((value - sum).abs() <= bound, "{what} at ({i}, {l}): {value} but {sum}");
        }
    }
}

/// Sum and sum of magnitudes of the products.
fn dot(products: impl Iterator<Item = f64>) -> (f64, f64) {
    products.fold((0.0, 0.0), |(sum, size), x| (sum + x, size + x.abs()))
}

/// A shape, and the strides of the sources.
#[derive(Clone, Copy, Debug)]
struct Case {
    classes: usize,
    features: usize,
    rows: usize,
    w: (isize, isize),
    e: (isize, isize),
}

/// Heights around every tile's, K around every step, contiguous and odd layouts.
fn cases() -> Vec<Case> {
    let mut cases = vec![];
    for classes in (1..=34).chain([47, 48, 63, 126, 128]) {
        let (f, rows) = (1 + classes * 7 % 67, 1 + classes * 5 % 70);
        let row = f as isize + 3;
        cases.push(Case { classes, features: f, rows, w: (row, 1), e: (row, 1) });
    }
    for features in [1, 2, 31, 32, 33, 64, 255, 256, 300] {
        let row = features as isize;
        for (w, e) in [
            ((row, 1), (row, 1)),
            ((1, 40), (1, 33)),
            ((2 * row, 2), (3 * row, 3)),
            ((-row, 1), (-row - 1, 1)),
            ((row, -1), (row, -1)),
        ] {
            cases.push(Case { classes: 40, features, rows: 33, w, e });
        }
    }
    cases
}

/// `z = W Eᵀ` of every panel, with W packed and, where the kernel allows it, in place.
fn logits<K: Kernel>(kernel: K) {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for case in cases() {
        let w = Matrix::<K::Element>::random(case.classes, case.features, case.w, &mut random);
        let e = Matrix::<K::Element>::random(case.rows, case.features, case.e, &mut random);
        let k = case.features.next_multiple_of(K::K_STEP);
        let a_row = k + 5;
        let mut a = vec![K::Operand::default(); case.classes * a_row];
        let mut b = vec![K::Operand::default(); k * LANES];
        let unit = case.w.1 == 1 && case.w.0 > 0;
        let in_place = if unit { K::in_place(&w.block()) } else { None };
        // SAFETY: `a` holds a row of `a_row` for every class.
        unsafe { kernel.pack_rows(&w.block(), a.as_mut_ptr(), a_row) };
        for first in (0..case.rows).step_by(LANES) {
            // SAFETY: `b` holds `k` times 32 operands.
            unsafe { kernel.pack_panel(&e.gather(first, 0, case.features), b.as_mut_ptr()) };
            for (a, a_row) in [(a.as_ptr(), a_row)]
                .into_iter()
                .chain(in_place.map(|start| (start, case.w.0.unsigned_abs())))
            {
                let mut c = Output::<K::Acc>::new(case.classes, 35, -7.0);
                kernel.begin_thread();
                // SAFETY: A, B and C were sized for this product.
                unsafe {
                    kernel.product(&Product {
                        m: case.classes,
                        pieces: 1,
                        k,
                        a,
                        a_row,
                        a_k: 1,
                        a_piece: 0,
                        b: b.as_ptr(),
                        c: c.data.as_mut_ptr(),
                        c_row: c.c_row,
                        accumulate: false,
                    });
                }
                kernel.end_thread();
                c.check(&format!("logits of {case:?}"), k, |i, l| {
                    if first + l >= case.rows {
                        return (0.0, 0.0);
                    }
                    dot((0..case.features).map(|j| w.get(i, j) * e.get(first + l, j)))
                });
            }
        }
    }
}

/// dz of every panel in operand format: left operand of dW, and right operand of dEᵀ.
struct Gradient<K: Kernel> {
    rows: Vec<K::Operand>,
    pairs: Vec<K::Operand>,
    /// Operands from one panel to the next.
    panel: usize,
    /// What a multiplier sees, `[panel][class][lane]`.
    seen: Vec<f64>,
}

impl<K: Kernel> Gradient<K> {
    fn random(kernel: K, classes: usize, panels: usize, random: &mut Random) -> Self {
        let panel = (classes.next_multiple_of(K::K_STEP) + 3) * LANES;
        let mut rows = vec![K::Operand::default(); panels * panel];
        let mut pairs = rows.clone();
        let mut seen = vec![];
        for p in 0..panels {
            let dz: Vec<K::Acc> =
                (0..classes * LANES).map(|_| K::Acc::from_f64(random.next())).collect();
            let (to, pairs) = (rows[p * panel..].as_mut_ptr(), pairs[p * panel..].as_mut_ptr());
            if K::GROUP == 1 {
                // SAFETY: operands are accumulators here, and a panel holds all classes.
                unsafe {
                    for to in [to, pairs] {
                        to.cast::<K::Acc>().copy_from_nonoverlapping(dz.as_ptr(), dz.len());
                    }
                }
                seen.extend(dz.iter().map(|x| x.to_f64()));
            } else {
                // SAFETY: a panel holds all classes, rounded up to K_STEP.
                unsafe { kernel.store_dz(dz.as_ptr(), classes, to, pairs) };
                // Through f32: `bf16::from_f64` ignores the lowest bits when it looks for ties.
                let rounded = |x: f64| half::bf16::from_f32(x as f32).to_f64();
                seen.extend(dz.iter().map(|x| rounded(x.to_f64())));
            }
        }
        Self { rows, pairs, panel, seen }
    }
}

/// `dW = dzᵀ E`: K is the rows of all panels, A jumps between them; and `dEᵀ = Wᵀ dz`, added to what is there.
fn gradients<K: Kernel>(kernel: K) {
    let mut random = Random(0xd1b5_4a32_d192_ed03);
    for case in cases() {
        let (classes, rows) = (case.classes, case.rows);
        let panels = rows.div_ceil(LANES);
        let dz = Gradient::<K>::random(kernel, classes, panels, &mut random);
        let seen = |row: usize, class: usize| {
            dz.seen[(row / LANES * classes + class) * LANES + row % LANES]
        };

        let e = Matrix::<K::Element>::random(rows, case.features, case.e, &mut random);
        let from = case.features - (case.features - 1) % LANES - 1;
        let mut b = vec![K::Operand::default(); panels * LANES * LANES];
        for p in 0..panels {
            let strip = e.gather(p * LANES, from, case.features - from);
            // SAFETY: every panel has 32 x 32 operands of `b`.
            unsafe { kernel.pack_strip(&strip, b[p * LANES * LANES..].as_mut_ptr()) };
        }
        let mut c = Output::<K::Acc>::new(classes, LANES, 0.5);
        kernel.begin_thread();
        // SAFETY: A, B and C were sized for this product.
        unsafe {
            kernel.product(&Product {
                m: classes,
                pieces: panels,
                k: LANES,
                a: dz.rows.as_ptr(),
                a_row: LANES,
                a_k: 1,
                a_piece: dz.panel,
                b: b.as_ptr(),
                c: c.data.as_mut_ptr(),
                c_row: c.c_row,
                accumulate: false,
            });
        }
        c.check(&format!("dW of {case:?}"), rows, |i, l| {
            let live = |l: usize| l < case.features - from;
            dot((0..rows).filter(|_| live(l)).map(|r| seen(r, i) * e.get(r, from + l)))
        });

        let w = Matrix::<K::Element>::random(classes, case.features, case.w, &mut random);
        let k = classes.next_multiple_of(K::K_STEP);
        let mut a = vec![K::Operand::default(); (classes + case.features) * (case.features + k)];
        let (a_row, a_k) = if K::COLUMN_A { (1, case.features) } else { (k + 2, 1) };
        // SAFETY: `a` holds the block in either order, padding included.
        unsafe {
            if K::COLUMN_A {
                kernel.pack_rows(&w.block(), a.as_mut_ptr(), a_k);
            } else {
                kernel.pack_columns(&w.block(), a.as_mut_ptr(), a_row);
            }
        }
        let mut c = Output::<K::Acc>::new(case.features, 40, 0.25);
        // SAFETY: A, B and C were sized for this product.
        unsafe {
            kernel.product(&Product {
                m: case.features,
                pieces: 1,
                k,
                a: a.as_ptr(),
                a_row,
                a_k,
                a_piece: 0,
                b: dz.pairs.as_ptr(),
                c: c.data.as_mut_ptr(),
                c_row: c.c_row,
                accumulate: true,
            });
        }
        kernel.end_thread();
        c.check(&format!("dE of {case:?}"), classes, |i, l| {
            let (sum, size) = dot((0..classes).map(|j| w.get(j, i) * seen(l, j)));
            (0.25 + sum, 0.25 + size)
        });
    }
}

#[test]
fn logits_agree_with_f64() {
    every_kernel!(logits);
}

#[test]
fn gradients_agree_with_f64() {
    every_kernel!(gradients);
}

/// The tiles in plain Rust, which x86-64 does not use, against SSE2: the same roundings, so the same bits.
#[cfg(target_arch = "x86_64")]
#[test]
fn portable_tiles_are_those_of_sse2() {
    fn check<A: Real>(portable: impl Fn(&Product<A, A>), sse2: impl Fn(&Product<A, A>)) {
        let mut random = Random(0x2545_f491_4f6c_dd1d);
        for m in 1..14 {
            for (a_row, a_k) in [(19, 1), (1, m)] {
                let mut draw =
                    |n| -> Vec<A> { (0..n).map(|_| A::from_f64(random.next())).collect() };
                let (a, b) = (draw(20 * 19), draw(17 * LANES));
                let run = |product: &dyn Fn(&Product<A, A>)| {
                    let mut c = vec![A::ONE; m * LANES];
                    product(&Product {
                        m,
                        pieces: 1,
                        k: 17,
                        a: a.as_ptr(),
                        a_row,
                        a_k,
                        a_piece: 0,
                        b: b.as_ptr(),
                        c: c.as_mut_ptr(),
                        c_row: LANES,
                        accumulate: true,
                    });
                    c
                };
                assert!(run(&portable) == run(&sse2), "{m} rows, steps {a_row} and {a_k}");
            }
        }
    }
    use super::{portable, x86};
    // SAFETY: SSE2 is part of x86-64, and the operands above hold the product.
    unsafe {
        check::<f32>(|p| portable::product_f32(p), |p| x86::sse2_f32(p));
        check::<f64>(|p| portable::product_f64(p), |p| x86::sse2_f64(p));
    }
}

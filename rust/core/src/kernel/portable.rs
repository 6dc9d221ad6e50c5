//! The register tile in plain Rust, for machines other than x86-64: LLVM keeps a [`Lanes`] in one 128-bit register.
//!
//! 4 x 8 tiles of f32, 4 x 4 of f64. Aarch64 has fused multiply-add in its baseline and uses it.
use super::isa::BASELINE_FUSES;
use super::tile::{Simd, tile, unit};
use super::{LANES, Product};
use crate::element::Real;

/// A register of `W` values.
#[derive(Clone, Copy)]
struct Lanes<A, const W: usize>([A; W]);

// SAFETY: plain Rust; each method touches exactly `W` values.
unsafe impl<A: Real, const W: usize> Simd for Lanes<A, W> {
    type Element = A;
    type Acc = A;
    type Operand = Self;
    const WIDTH: usize = W;
    const GROUP: usize = 1;

    #[inline(always)]
    unsafe fn zero() -> Self {
        Self([A::ZERO; W])
    }
    #[inline(always)]
    unsafe fn operands(b: *const A) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Self(b.cast::<[A; W]>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn splat(a: *const A) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Self([a.read_unaligned(); W]) }
    }
    #[inline(always)]
    unsafe fn mul_add(mut self, a: Self, b: Self) -> Self {
        for (sum, (a, b)) in self.0.iter_mut().zip(a.0.into_iter().zip(b.0)) {
            *sum = a.mul_add::<BASELINE_FUSES>(b, *sum);
        }
        self
    }
    #[inline(always)]
    unsafe fn add(mut self, other: Self) -> Self {
        for (sum, other) in self.0.iter_mut().zip(other.0) {
            *sum += other;
        }
        self
    }
    #[inline(always)]
    unsafe fn load(c: *const A) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Self::operands(c) }
    }
    #[inline(always)]
    unsafe fn store(self, c: *mut A) {
        // SAFETY: the trait's contract.
        unsafe { c.cast::<[A; W]>().write_unaligned(self.0) }
    }
}

/// Registers of C side by side, and rows of a tile.
const COLS: usize = 2;
const MOST: usize = 4;

/// f32, four to a register.
///
/// # Safety
/// As for [`super::Kernel::product`].
pub(crate) unsafe fn product_f32(p: &Product<f32, f32>) {
    // SAFETY: the caller's promise.
    unsafe { product::<f32, 4>(p) }
}

/// f64, two to a register.
///
/// # Safety
/// As for [`super::Kernel::product`].
pub(crate) unsafe fn product_f64(p: &Product<f64, f64>) {
    // SAFETY: the caller's promise.
    unsafe { product::<f64, 2>(p) }
}

/// One product, `W` values to a register.
///
/// # Safety
/// As for [`super::Kernel::product`].
unsafe fn product<A: Real, const W: usize>(p: &Product<A, A>) {
    let tiles = p.m.div_ceil(MOST);
    for column in (0..LANES).step_by(COLS * W) {
        let mut row = 0;
        for t in 0..tiles {
            let next = p.m * (t + 1) / tiles;
            // SAFETY: rows and columns lie inside the product, whose extents the caller vouches for.
            unsafe {
                match (next - row, p.a_k) {
                    (1, 1) => tile::<Lanes<A, W>, 1, COLS, { unit::K }>(p, row, column),
                    (2, 1) => tile::<Lanes<A, W>, 2, COLS, { unit::K }>(p, row, column),
                    (3, 1) => tile::<Lanes<A, W>, 3, COLS, { unit::K }>(p, row, column),
                    (4, 1) => tile::<Lanes<A, W>, 4, COLS, { unit::K }>(p, row, column),
                    (1, _) => tile::<Lanes<A, W>, 1, COLS, { unit::ROW }>(p, row, column),
                    (2, _) => tile::<Lanes<A, W>, 2, COLS, { unit::ROW }>(p, row, column),
                    (3, _) => tile::<Lanes<A, W>, 3, COLS, { unit::ROW }>(p, row, column),
                    (4, _) => tile::<Lanes<A, W>, 4, COLS, { unit::ROW }>(p, row, column),
                    _ => unreachable!("a register tile has at most {MOST} rows"),
                }
            }
            row = next;
        }
    }
}

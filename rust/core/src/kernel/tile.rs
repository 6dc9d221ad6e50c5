//! The register tile: one matrix microkernel for every instruction set and element type.
//!
//! ```text
//!   C [m][32]  (+)=  A [m][K] · B [K][32]
//!
//!            B   [k][32]   packed panel, contiguous
//!            ┌──────────────┐
//!   A[i][k] ─┤ splat · load │   M x COLS registers of C stay in registers for the whole of K
//!            └──────────────┘
//! ```
//!
//! A is broadcast from memory at any stride, so it needs no packing for this tile's sake. A *lane* of A
//! and B is one f32, one f64, or a pair of bf16 neighbours along K ([`Simd::GROUP`] of them).
//! Instruction sets differ by a [`Simd`] of one-line methods; the loop below is written once and compiled
//! inside `#[target_feature]` wrappers (`x86.rs`), into which all of it is inlined.
//!
//! Each element of C is the same chain of multiply-adds in order of K whatever the height of its tile,
//! so cutting `m` differently never changes a bit.
use super::{LANES, Product};

/// One register of accumulators, and the multiply that feeds it.
///
/// # Safety
/// The methods run instructions of the implementor's set and may be called only where it is present.
/// Pointers must be valid for the `WIDTH` lanes that a method touches; alignment is not required.
pub(crate) unsafe trait Simd: Copy {
    /// Element of A and B.
    type Element: Copy;
    /// Element of C.
    type Acc: Copy;
    /// Register of A or B: `WIDTH` lanes of `GROUP` elements.
    type Operand: Copy;
    /// Lanes of a register.
    const WIDTH: usize;
    /// Elements of A and B in one lane.
    const GROUP: usize;

    /// All lanes zero.
    unsafe fn zero() -> Self;
    /// `WIDTH` lanes of B.
    unsafe fn operands(b: *const Self::Element) -> Self::Operand;
    /// One lane of A, everywhere.
    unsafe fn splat(a: *const Self::Element) -> Self::Operand;
    /// `self + a · b`, lane by lane.
    unsafe fn mul_add(self, a: Self::Operand, b: Self::Operand) -> Self;
    /// Lane-wise sum.
    unsafe fn add(self, other: Self) -> Self;
    /// Reads accumulators.
    unsafe fn load(c: *const Self::Acc) -> Self;
    /// Writes accumulators.
    unsafe fn store(self, c: *mut Self::Acc);
    /// Asks for the cache line at `p`, which need not be valid.
    #[inline(always)]
    unsafe fn prefetch(_p: *const Self::Element) {}
}

/// Which stride of A is one lane, so that the addressing of the inner loop folds into instructions.
pub(crate) mod unit {
    /// Neighbours along K are contiguous.
    pub(crate) const K: u8 = 1;
    /// Neighbours along the rows of C are contiguous.
    pub(crate) const ROW: u8 = 2;
}

/// Rows `row .. row + M`, columns `column .. column + COLS · WIDTH` of one product.
///
/// # Safety
/// The product's pointers span what [`Product`] says, the rows and columns lie inside it, `UNIT` holds of
/// A's strides, and the instruction set of `S` is present.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
pub(crate) unsafe fn tile<S: Simd, const M: usize, const COLS: usize, const UNIT: u8>(
    p: &Product<S::Element, S::Acc>,
    row: usize,
    column: usize,
) {
    let a_row = if UNIT == unit::ROW { S::GROUP } else { p.a_row };
    let a_k = if UNIT == unit::K { S::GROUP } else { p.a_k * S::GROUP };
    let b_k = LANES * S::GROUP;
    // SAFETY: the caller vouches for the extents of A, B and C; the loops visit exactly the
    // `pieces · k` steps of K of its rows and columns. Pointers run past the end only by wrapping_add.
    unsafe {
        let mut sum = [[S::zero(); COLS]; M];
        let mut b = p.b.add(column * S::GROUP);
        if p.accumulate {
            // Sums of dE come from far; they are wanted only after all of K.
            for i in 0..M {
                for j in 0..COLS {
                    S::prefetch(p.c.add((row + i) * p.c_row + column + j * S::WIDTH).cast());
                }
            }
        }
        for piece in 0..p.pieces {
            let mut a = p.a.add(row * p.a_row + piece * p.a_piece);
            if piece + 1 < p.pieces {
                // The jump to the next piece is invisible to the hardware prefetcher.
                let next = a.wrapping_add(p.a_piece);
                for i in 0..M {
                    S::prefetch(next.wrapping_add(i * a_row));
                    S::prefetch(next.wrapping_byte_add(64).wrapping_add(i * a_row));
                }
            }
            let mut steps = p.k / S::GROUP;
            while steps >= 4 {
                for u in 0..4 {
                    step::<S, M, COLS>(&mut sum, a.add(u * a_k), a_row, b.add(u * b_k));
                }
                a = a.wrapping_add(4 * a_k);
                b = b.wrapping_add(4 * b_k);
                steps -= 4;
            }
            while steps > 0 {
                step::<S, M, COLS>(&mut sum, a, a_row, b);
                a = a.wrapping_add(a_k);
                b = b.wrapping_add(b_k);
                steps -= 1;
            }
        }
        for i in 0..M {
            for j in 0..COLS {
                let c = p.c.add((row + i) * p.c_row + column + j * S::WIDTH);
                let value = if p.accumulate { sum[i][j].add(S::load(c)) } else { sum[i][j] };
                value.store(c);
            }
        }
    }
}

/// One step of K: `COLS` loads of B, `M` broadcasts of A, `M · COLS` multiplies.
///
/// Plain index loops: a closure or adaptor that LLVM declines to inline would lose the instruction set.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
unsafe fn step<S: Simd, const M: usize, const COLS: usize>(
    sum: &mut [[S; COLS]; M],
    a: *const S::Element,
    a_row: usize,
    b: *const S::Element,
) {
    // SAFETY: the caller of `tile` vouches for M rows of A and COLS registers of B at this step.
    unsafe {
        let mut columns = [S::operands(b); COLS];
        for j in 1..COLS {
            columns[j] = S::operands(b.add(j * S::WIDTH * S::GROUP));
        }
        for i in 0..M {
            let a = S::splat(a.add(i * a_row));
            for j in 0..COLS {
                sum[i][j] = sum[i][j].mul_add(a, columns[j]);
            }
        }
    }
}

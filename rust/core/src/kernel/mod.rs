//! The one product that both engines are made of, and what an instruction set supplies to run it.
//!
//! Lanes are rows: 32 rows of the input form a *panel*, and every tile is `[something][32]`.
//! All three matrix products of the engine have one shape, `C[m][32] (+)= A[m][k] · B[k][32]`:
//!
//! | product | A | B | C |
//! |---|---|---|---|
//! | logits `z = W Eᵀ` | classes of `W`, k = features | panel of `Eᵀ` | `z[class][32 rows]` |
//! | `dW = dzᵀ E` | `dz[class][rows]`, k = rows | strip of `E` | `dW[class][32 features]` |
//! | `dEᵀ = Wᵀ dz` | `Wᵀ[feature][class]`, k = classes | panel of `dz` | `dEᵀ[feature][32 rows]` |
//!
//! A [`Kernel`] is one element type on one instruction set. It says how operands are laid out,
//! packs them, and multiplies. Everything else (blocking, threads, statistics) is the engine's.

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
pub(crate) mod bf16;
pub(crate) mod convert;
pub(crate) mod isa;
pub(crate) mod pack;
#[cfg(target_arch = "x86_64")]
mod pack_bf16;
#[cfg(any(test, not(target_arch = "x86_64")))]
pub(crate) mod portable;
#[cfg(test)]
mod tests;
pub(crate) mod tile;
pub(crate) mod vector;
#[cfg(target_arch = "x86_64")]
pub(crate) mod x86;

use crate::element::{Element, Real};
pub(crate) use isa::{Isa, Vectorize};

/// Rows of a panel, columns of a strip: the width of every packed operand and of every tile.
pub(crate) const LANES: usize = 32;

/// Asks for the cache line at `p`, which need not be valid.
#[inline(always)]
pub(crate) fn prefetch<T>(p: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch never faults, and every x86-64 has it.
    unsafe {
        use core::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

/// `C[m][32] (+)= A[m][K] · B[K][32]` with `K = pieces · k`, every pointer valid for what it spans.
///
/// The element `A[i][p·k + j]` is at `a + i·a_row + p·a_piece + j·a_k`; `B` runs on through the
/// pieces as `[K / GROUP][32][GROUP]`; `C[i][l]` is at `c + i·c_row + l`. `C` is always 32 wide.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Product<T, A> {
    /// Rows of `C`; any number from 1.
    pub m: usize,
    /// Number of pieces that K is cut in.
    pub pieces: usize,
    /// Length of one piece; a multiple of [`Kernel::K_STEP`].
    pub k: usize,
    /// First element of `A`.
    pub a: *const T,
    /// Step from one row of `A` to the next.
    pub a_row: usize,
    /// Step along k inside a piece: 1, unless `a_row` is 1 ([`Kernel::COLUMN_A`] only).
    pub a_k: usize,
    /// Step from one piece to the next.
    pub a_piece: usize,
    /// Packed right operand.
    pub b: *const T,
    /// First element of `C`.
    pub c: *mut A,
    /// Step from one row of `C` to the next; at least 32.
    pub c_row: usize,
    /// Add to `C` instead of writing it.
    pub accumulate: bool,
}

/// Up to 32 vectors of equal length, anywhere in memory: a panel's rows of the input.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gather<E> {
    /// First element of each vector; only the first `count` are valid.
    pub start: [*const E; LANES],
    /// Number of vectors, 1 to 32.
    pub count: usize,
    /// Step between the elements of a vector.
    pub step: isize,
    /// Elements of each vector.
    pub len: usize,
}

/// A strided block of a matrix: classes of the weight.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block<E> {
    /// First element.
    pub start: *const E,
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub cols: usize,
    /// Step from one row to the next.
    pub row: isize,
    /// Step from one column to the next.
    pub col: isize,
}

/// One element type on one instruction set.
///
/// Packed operands hold [`Kernel::Operand`]; K is padded with zeros to a multiple of `K_STEP` by the
/// packers. A kernel whose operands are its accumulators (f32, f64, halves by widening) has
/// `GROUP = 1`, `K_STEP = 1`, reads `dz` where the statistics left it and never sees `store_dz`.
///
/// # Safety
/// Every method may use the instruction set: an instance must exist only where it was detected.
pub(crate) unsafe trait Kernel: Copy + Send + Sync + 'static {
    /// What the caller's input and weight hold.
    type Element: Element;
    /// What the multiplier reads.
    type Operand: Copy + Send + Sync + Default + 'static;
    /// What it accumulates in; type of logits and statistics.
    type Acc: Real;
    /// The level whose vector instructions run the statistics.
    type Isa: Isa;

    /// Neighbours along K that sit side by side in B: 1, or 2 for bf16 pairs.
    const GROUP: usize;
    /// K of every product is a multiple of this: 1, or 32 for tiles of bf16.
    const K_STEP: usize;
    /// The `m` the multiplier likes: classes are blocked in multiples of it.
    const M_STEP: usize;
    /// The product also takes `a_row == 1` with any `a_k` (so `Wᵀ` is read from packed `W`).
    const COLUMN_A: bool;

    /// The level of the statistics loops.
    fn isa(self) -> Self::Isa;

    /// Called by each thread before its first product of a call, with `end_thread` after its last.
    #[inline]
    fn begin_thread(self) {}
    /// See [`Kernel::begin_thread`].
    #[inline]
    fn end_thread(self) {}

    /// Runs one product.
    ///
    /// # Safety
    /// The pointers of `p` are valid for everything that it spans; `C` overlaps neither operand.
    unsafe fn product(self, p: &Product<Self::Operand, Self::Acc>);

    /// Whether the rows of `W` can be read in place as the left operand (unit column step given).
    #[inline]
    fn in_place(_w: &Block<Self::Element>) -> Option<*const Self::Operand> {
        None
    }

    /// Right operand from vectors along K: `out[k / GROUP][lane][k % GROUP] = rows[lane][k]`, lanes
    /// past `count` and k past `len` (to the next multiple of `K_STEP`) zero. `out` holds
    /// `len.next_multiple_of(K_STEP) · 32` operands.
    ///
    /// # Safety
    /// The vectors are readable and `out` is writable for that many operands.
    unsafe fn pack_panel(self, rows: &Gather<Self::Element>, out: *mut Self::Operand);

    /// Right operand whose K is the vectors themselves (one strip of features of 32 rows):
    /// `out[r / GROUP][l][r % GROUP] = rows[r][l]` for `l < len <= 32`; the rest of the `32 · 32`
    /// operands is zero.
    ///
    /// # Safety
    /// As for [`Kernel::pack_panel`], with `32 · 32` operands.
    unsafe fn pack_strip(self, rows: &Gather<Self::Element>, out: *mut Self::Operand);

    /// Left operand: `out[i · out_row + j] = w[i][j]`, columns up to the next multiple of `K_STEP` zero.
    ///
    /// # Safety
    /// The block is readable; `out` is writable for `rows · out_row` operands.
    unsafe fn pack_rows(self, w: &Block<Self::Element>, out: *mut Self::Operand, out_row: usize);

    /// Transposed left operand: `out[j · out_row + i] = w[i][j]`, `i` up to the next multiple of
    /// `K_STEP` zero. Never called where `COLUMN_A` holds.
    ///
    /// # Safety
    /// The block is readable; `out` is writable for `cols · out_row` operands.
    unsafe fn pack_columns(self, w: &Block<Self::Element>, out: *mut Self::Operand, out_row: usize);

    /// Rounds a gradient tile `dz[class][32]` to operands in both orders: `rows[class][32]` (left
    /// operand of dW) and `pairs[class / GROUP][32][class % GROUP]` (right operand of dE). Classes
    /// up to the next multiple of `K_STEP` are zero in `pairs`. Never called where
    /// `Operand` is `Acc`.
    ///
    /// # Safety
    /// `dz` is readable for `classes · 32` values, both outputs writable for
    /// `classes.next_multiple_of(K_STEP) · 32` operands.
    unsafe fn store_dz(
        self,
        dz: *const Self::Acc,
        classes: usize,
        rows: *mut Self::Operand,
        pairs: *mut Self::Operand,
    );
}

//! Packing for kernels whose operands are their accumulators (`GROUP = K_STEP = 1`): widen on the way.
//!
//! Plain loops, compiled for each level inside `Isa::vectorize`. Contiguous sources go by fixed-size arrays,
//! which vectorise; any other step goes one element at a time.

use super::{Block, Gather, LANES};
use crate::element::Element;

/// `N` neighbours, widened.
///
/// # Safety
/// They are readable.
#[inline(always)]
unsafe fn widen<E: Element, const N: usize>(from: *const E) -> [E::Acc; N] {
    // SAFETY: the caller's promise.
    let values = unsafe { from.cast::<[E; N]>().read_unaligned() };
    let mut wide = [E::Acc::default(); N];
    for (wide, value) in wide.iter_mut().zip(values) {
        *wide = value.widen();
    }
    wide
}

/// `to[j] = from[j · step]`, widened, for `j < count`.
///
/// # Safety
/// Both sides are valid for `count` elements.
#[inline(always)]
unsafe fn copy<E: Element>(from: *const E, step: isize, count: usize, to: *mut E::Acc) {
    const CHUNK: usize = 32;
    let whole = if step == 1 { count - count % CHUNK } else { 0 };
    // SAFETY: `j` stays below `count` on both sides.
    unsafe {
        for j in (0..whole).step_by(CHUNK) {
            to.add(j).cast::<[E::Acc; CHUNK]>().write_unaligned(widen::<E, CHUNK>(from.add(j)));
        }
        for j in whole..count {
            *to.add(j) = from.offset(j as isize * step).read_unaligned().widen();
        }
    }
}

/// [`super::Kernel::pack_panel`] for kernels with `GROUP = 1`.
///
/// # Safety
/// The vectors are readable; `out` holds `len · 32` values.
#[inline(always)]
pub(crate) unsafe fn panel<E: Element>(rows: &Gather<E>, out: *mut E::Acc) {
    // Blocks of 32 along K pass through a buffer in L1: reads of a row run on, and so do the writes.
    const BLOCK: usize = 32;
    let mut buffer = [[E::Acc::default(); BLOCK]; LANES];
    for k0 in (0..rows.len).step_by(BLOCK) {
        let block = (rows.len - k0).min(BLOCK);
        // SAFETY: `lane < count` and `k0 .. k0 + block` index readable elements; `out` holds len · 32.
        unsafe {
            for (lane, buffer) in buffer.iter_mut().enumerate().take(rows.count) {
                let from = rows.start[lane].offset(k0 as isize * rows.step);
                copy(from, rows.step, block, buffer.as_mut_ptr());
            }
            for k in 0..block {
                let mut column = [E::Acc::default(); LANES];
                for (value, row) in column.iter_mut().zip(&buffer) {
                    *value = row[k];
                }
                out.add((k0 + k) * LANES).cast::<[E::Acc; LANES]>().write_unaligned(column);
            }
        }
    }
}

/// [`super::Kernel::pack_strip`] for kernels with `GROUP = 1`.
///
/// # Safety
/// The vectors are readable, `len <= 32`; `out` holds 1024 values.
#[inline(always)]
pub(crate) unsafe fn strip<E: Element>(rows: &Gather<E>, out: *mut E::Acc) {
    for row in 0..LANES {
        let len = if row < rows.count { rows.len } else { 0 };
        // SAFETY: `row < count` and `l < len` index readable elements; `out` holds 32 · 32.
        unsafe {
            let to = out.add(row * LANES);
            copy(rows.start[row.min(rows.count - 1)], rows.step, len, to);
            to.add(len).write_bytes(0, LANES - len);
        }
    }
}

/// [`super::Kernel::pack_rows`] for kernels with `K_STEP = 1`.
///
/// # Safety
/// The block is readable; `out` holds `rows · out_row` values.
#[inline(always)]
pub(crate) unsafe fn rows<E: Element>(w: &Block<E>, out: *mut E::Acc, out_row: usize) {
    for i in 0..w.rows {
        // SAFETY: row `i` stays inside the block and inside `out`.
        unsafe {
            copy(w.start.offset(i as isize * w.row), w.col, w.cols, out.add(i * out_row));
        }
    }
}

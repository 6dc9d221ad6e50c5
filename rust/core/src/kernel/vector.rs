//! The kernel of every element type at every vector level: operands are widened while packing.

use super::{Block, Gather, Isa, Kernel, Product, Vectorize, pack};
use crate::element::{Element, Real};
use std::marker::PhantomData;

/// Elements of type `E`, multiplied as `E::Acc` at level `I`.
#[derive(Debug)]
pub(crate) struct Vector<E, I> {
    isa: I,
    element: PhantomData<E>,
}

impl<E, I> Vector<E, I> {
    /// The kernel at a level that was detected.
    pub(crate) fn new(isa: I) -> Self {
        Self { isa, element: PhantomData }
    }
}

impl<E, I: Copy> Clone for Vector<E, I> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<E, I: Copy> Copy for Vector<E, I> {}

// SAFETY: an instance holds an `Isa`, which exists only where it was detected.
unsafe impl<E: Element, I: Isa> Kernel for Vector<E, I> {
    type Element = E;
    type Operand = E::Acc;
    type Acc = E::Acc;
    type Isa = I;

    const GROUP: usize = 1;
    const K_STEP: usize = 1;
    const M_STEP: usize = 14;
    const COLUMN_A: bool = true;

    #[inline]
    fn isa(self) -> I {
        self.isa
    }

    #[inline]
    unsafe fn product(self, p: &Product<E::Acc, E::Acc>) {
        // SAFETY: the caller's promise; the level was detected.
        unsafe { E::Acc::product::<I>(p) }
    }

    #[inline]
    fn in_place(w: &Block<E>) -> Option<*const E::Acc> {
        // Rows 4 KiB apart fall into one set of the first-level cache: a padded copy is faster.
        let aliased = w.rows > 8 && (w.row.unsigned_abs() * size_of::<E>()).is_multiple_of(4096);
        let same = E::DTYPE == E::Acc::DTYPE;
        (same && w.col == 1 && w.row > 0 && !aliased).then_some(w.start.cast())
    }

    unsafe fn pack_panel(self, rows: &Gather<E>, out: *mut E::Acc) {
        struct Work<'a, E: Element>(&'a Gather<E>, *mut E::Acc);
        impl<E: Element> Vectorize for Work<'_, E> {
            type Output = ();
            #[inline(always)]
            fn run<const FMA: bool>(self) {
                // SAFETY: the promise of the enclosing method.
                unsafe { pack::panel(self.0, self.1) }
            }
        }
        self.isa.vectorize(Work(rows, out))
    }

    unsafe fn pack_strip(self, rows: &Gather<E>, out: *mut E::Acc) {
        struct Work<'a, E: Element>(&'a Gather<E>, *mut E::Acc);
        impl<E: Element> Vectorize for Work<'_, E> {
            type Output = ();
            #[inline(always)]
            fn run<const FMA: bool>(self) {
                // SAFETY: the promise of the enclosing method.
                unsafe { pack::strip(self.0, self.1) }
            }
        }
        self.isa.vectorize(Work(rows, out))
    }

    unsafe fn pack_rows(self, w: &Block<E>, out: *mut E::Acc, out_row: usize) {
        struct Work<'a, E: Element>(&'a Block<E>, *mut E::Acc, usize);
        impl<E: Element> Vectorize for Work<'_, E> {
            type Output = ();
            #[inline(always)]
            fn run<const FMA: bool>(self) {
                // SAFETY: the promise of the enclosing method.
                unsafe { pack::rows(self.0, self.1, self.2) }
            }
        }
        self.isa.vectorize(Work(w, out, out_row))
    }

    unsafe fn pack_columns(self, _: &Block<E>, _: *mut E::Acc, _: usize) {
        unreachable!("the product reads columns of a packed weight directly")
    }

    unsafe fn store_dz(self, _: *const E::Acc, _: usize, _: *mut E::Acc, _: *mut E::Acc) {
        unreachable!("the gradient tile is its own operand")
    }
}

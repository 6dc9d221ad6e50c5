//! One block of memory a call, cut as the plan says.

use crate::error::{Error, Result};
use std::alloc::{Layout, alloc, dealloc};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Alignment of the block and of every region in it: a cache line, a vector.
const ALIGN: usize = 64;

/// The largest block that is kept for the next call.
const KEPT: usize = 4 << 20;

/// A share of the block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Region {
    pub offset: usize,
    pub bytes: usize,
}

/// Cuts a block into named regions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Arena {
    /// Bytes so far.
    pub bytes: usize,
    /// Every region with its name.
    pub parts: Vec<(&'static str, usize)>,
}

impl Arena {
    /// The next region, of `count` items of `size` bytes.
    pub(crate) fn take(&mut self, name: &'static str, count: usize, size: usize) -> Region {
        let bytes = (count * size).next_multiple_of(ALIGN);
        let region = Region { offset: self.bytes, bytes };
        self.bytes += bytes;
        if bytes > 0 {
            self.parts.push((name, bytes));
        }
        region
    }
}

/// The block of one call; a small one is handed on to the next call.
pub(crate) struct Scratch {
    block: Option<Block>,
    address: *mut u8,
}

/// An allocation.
struct Block {
    address: *mut u8,
    layout: Layout,
}

// SAFETY: an allocation belongs to whoever holds it.
unsafe impl Send for Block {}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.address, self.layout) }
    }
}

/// A small block of a finished call. Only ever tried, never waited for: a fork may leave it locked.
static SPARE: Mutex<Option<Block>> = Mutex::new(None);

static LAST: AtomicUsize = AtomicUsize::new(0);

/// Bytes of scratch that the last engine call allocated, in any thread.
pub fn last_workspace_bytes() -> usize {
    LAST.load(Ordering::Relaxed)
}

impl Scratch {
    /// Allocates exactly `bytes`, uninitialised.
    pub(crate) fn new(bytes: usize) -> Result<Self> {
        LAST.store(bytes, Ordering::Relaxed);
        let memory = Error::Memory { bytes };
        let layout =
            Layout::from_size_align(bytes.max(ALIGN), ALIGN).map_err(|_| memory.clone())?;
        let spare = SPARE.try_lock().ok().and_then(|mut spare| spare.take());
        if let Some(block) = spare.filter(|block| block.layout == layout) {
            return Ok(Self { address: block.address, block: Some(block) });
        }
        // SAFETY: the size is not zero.
        let address = unsafe { alloc(layout) };
        if address.is_null() {
            return Err(memory);
        }
        Ok(Self { address, block: Some(Block { address, layout }) })
    }

    /// Address of a region, `offset` bytes further on.
    pub(crate) fn at<T>(&self, region: Region, offset: usize) -> *mut T {
        self.address.wrapping_add(region.offset + offset).cast()
    }
}

// SAFETY: handing out addresses is all that threads share of it.
unsafe impl Sync for Scratch {}

impl Drop for Scratch {
    fn drop(&mut self) {
        let block = self.block.take().filter(|block| block.layout.size() <= KEPT);
        if let (Some(block), Ok(mut spare)) = (block, SPARE.try_lock()) {
            *spare = Some(block);
        }
    }
}

/// A raw pointer that worker threads may share; they write disjoint parts.
#[derive(Debug)]
pub(crate) struct Shared<T>(*mut T);

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Shared<T> {}

// SAFETY: every use goes through an `unsafe` block that says why parts are disjoint.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(crate) fn new(start: *mut T) -> Self {
        Self(start)
    }

    /// The address of an element.
    #[inline(always)]
    pub(crate) fn at(self, index: usize) -> *mut T {
        self.0.wrapping_add(index)
    }

    /// Some elements.
    ///
    /// # Safety
    /// They are initialised and nobody writes them meanwhile.
    #[inline(always)]
    pub(crate) unsafe fn slice<'a>(self, first: usize, len: usize) -> &'a [T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts(self.at(first), len) }
    }

    /// Some elements, to write.
    ///
    /// # Safety
    /// Nobody else accesses them meanwhile; the type has no invalid bit patterns.
    #[inline(always)]
    pub(crate) unsafe fn slice_mut<'a>(self, first: usize, len: usize) -> &'a mut [T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.at(first), len) }
    }
}

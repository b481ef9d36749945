//! Memory that threads of a [`Team`](crate::pool::Team) write together.
//!
//! Owns alignment (64 bytes; large ones are mappings of their own, resident only where touched, in
//! huge pages) and the one unsafe contract of the forward pass: between two barriers, a range is either read by any
//! thread or written by one.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

/// Cache lines and AVX-512 registers.
const ALIGN: usize = 64;
/// From this size on, ask for huge pages: a stream over 4 KiB pages misses the TLB.
const HUGE_BYTES: usize = 4 << 20;
/// A huge page.
const HUGE_PAGE: usize = 2 << 20;
/// A chunk of an arena: what is left of the last one costs address space, not memory.
const CHUNK_BYTES: usize = 64 << 20;

/// Plain numbers for which all-zero bytes are a value.
pub trait Element: Copy + Send + Sync + 'static {}
impl Element for u8 {}
impl Element for i8 {}
impl Element for u16 {}
impl Element for i32 {}
impl Element for u32 {}
impl Element for f32 {}

/// A fixed number of elements, zero at first.
pub struct Buffer<T: Element> {
    start: NonNull<T>,
    len: usize,
    /// The chunk it is part of; `None` owns its memory.
    chunk: Option<Arc<Chunk>>,
}

/// Gives out buffers side by side in huge pages: weights of one model, most of which are smaller
/// than a huge page and are streamed one after another.
#[derive(Default)]
pub struct Arena {
    /// The chunk being filled and the bytes given out of it.
    current: RefCell<Option<(Arc<Chunk>, usize)>>,
}

/// A mapping that several buffers share; resident only where touched.
struct Chunk {
    memory: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a chunk is memory; access goes through the buffers in it, which do not overlap.
unsafe impl Send for Chunk {}
// SAFETY: as above.
unsafe impl Sync for Chunk {}

impl Drop for Chunk {
    fn drop(&mut self) {
        // SAFETY: mapped by `Arena::buffer` with this size; the last buffer in it is gone.
        unsafe { drop_map(self.memory.as_ptr().cast(), self.bytes) };
    }
}

impl Arena {
    /// `len` zeros.
    #[must_use]
    pub fn buffer<T: Element>(&self, len: usize) -> Buffer<T> {
        if len == 0 {
            return Buffer::new(0);
        }
        let bytes = Buffer::<T>::layout(len).size().next_multiple_of(ALIGN);
        let mut current = self.current.borrow_mut();
        let fits = |(chunk, used): &(Arc<Chunk>, usize)| used + bytes <= chunk.bytes;
        let (chunk, used) = match current.take().filter(fits) {
            Some(place) => place,
            None => {
                let bytes = bytes.next_multiple_of(HUGE_PAGE).max(CHUNK_BYTES) + HUGE_PAGE;
                let memory = map(bytes);
                let used = memory.as_ptr().align_offset(HUGE_PAGE);
                (Arc::new(Chunk { memory, bytes }), used)
            }
        };
        // SAFETY: `used + bytes` is inside the chunk, whose start and parts are aligned.
        let start = unsafe { chunk.memory.add(used) }.cast();
        *current = Some((Arc::clone(&chunk), used + bytes));
        Buffer {
            start,
            len,
            chunk: Some(chunk),
        }
    }
}

// SAFETY: a buffer owns its memory like a Vec; shared writes go through the contract of `write`.
unsafe impl<T: Element> Send for Buffer<T> {}
// SAFETY: as above.
unsafe impl<T: Element> Sync for Buffer<T> {}

impl<T: Element> Buffer<T> {
    /// `len` zeros.
    #[must_use]
    pub fn new(len: usize) -> Self {
        if len == 0 {
            return Self {
                start: NonNull::dangling(),
                len,
                chunk: None,
            };
        }
        let memory = match Self::layout(len) {
            layout if layout.size() >= HUGE_BYTES => map(layout.size()),
            // SAFETY: the layout has a size above 0.
            layout => NonNull::new(unsafe { alloc_zeroed(layout) })
                .unwrap_or_else(|| handle_alloc_error(layout)),
        };
        Self {
            start: memory.cast(),
            len,
            chunk: None,
        }
    }

    fn layout(len: usize) -> Layout {
        len.checked_mul(size_of::<T>())
            .and_then(|bytes| Layout::from_size_align(bytes, ALIGN).ok())
            .expect("sizes come from checked configurations")
    }

    /// Elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// True without elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Makes room for `len` elements; contents are lost when it grows.
    pub fn grow(&mut self, len: usize) {
        if len > self.len {
            *self = Self::new(len);
        }
    }

    /// All elements, by the owner.
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: the memory is owned, initialised, and borrowed mutably here.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }

    /// Reads a range.
    ///
    /// # Safety
    /// No thread writes any of it until the next barrier.
    #[must_use]
    pub unsafe fn read(&self, range: Range<usize>) -> &[T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: inside the allocation; nobody writes it meanwhile, by contract.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().add(range.start), range.len()) }
    }

    /// Writes a range.
    ///
    /// # Safety
    /// No other thread reads or writes any of it until the next barrier, and this thread holds no
    /// other reference into it.
    #[must_use]
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn write(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: inside the allocation; exclusive by contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().add(range.start), range.len()) }
    }
}

impl<T: Element> Buffer<T> {
    /// A range as single cells, where threads write elements that interleave.
    ///
    /// # Safety
    /// No other thread reads or writes the cells that this thread sets until the next barrier, and
    /// no slice from [`Buffer::read`] or [`Buffer::write`] covers them meanwhile.
    #[must_use]
    pub unsafe fn cells(&self, range: Range<usize>) -> &[Cell<T>] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: inside the allocation; a Cell has the layout of its content.
        unsafe {
            std::slice::from_raw_parts(
                self.start.as_ptr().add(range.start).cast::<Cell<T>>(),
                range.len(),
            )
        }
    }
}

impl<T: Element> Drop for Buffer<T> {
    fn drop(&mut self) {
        if self.len > 0 && self.chunk.is_none() {
            let (layout, memory) = (Self::layout(self.len), self.start.as_ptr());
            // SAFETY: `new` mapped or allocated it with this layout.
            unsafe {
                match layout.size() >= HUGE_BYTES {
                    true => drop_map(memory.cast(), layout.size()),
                    false => dealloc(memory.cast(), layout),
                }
            }
        }
    }
}

/// A new mapping of zeros.
fn map(bytes: usize) -> NonNull<u8> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new anonymous mapping of more than 0 bytes; the result is checked.
    let memory = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0) };
    assert!(
        memory != libc::MAP_FAILED,
        "no address space for {bytes} bytes"
    );
    // SAFETY: the range is the mapping itself; advice changes no contents, and a failure only costs
    // speed.
    unsafe { libc::madvise(memory, bytes, libc::MADV_HUGEPAGE) };
    NonNull::new(memory.cast()).expect("a mapping is not at 0")
}

/// Ends a mapping.
///
/// # Safety
/// `memory` came from [`map`] with the same `bytes` and is not used again.
unsafe fn drop_map(memory: *mut libc::c_void, bytes: usize) {
    // SAFETY: by contract.
    unsafe { libc::munmap(memory, bytes) };
}

//! The instruction sets that the crate is compiled for, and the choice among them at run time.
//!
//! `per_isa!` compiles a plain Rust function once for each of them: the same operations in the same
//! order (Rust never fuses or reorders floating point on its own), in wider registers.

/// Instruction sets, best last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust; a fused multiply-add is a library call where the processor has none.
    Portable,
    /// The portable code compiled for AVX2 and FMA.
    Avx2,
    /// Hand-written, with VNNI.
    Avx512,
    /// AVX-512, and AMX tiles for MXFP4 products of many rows.
    Amx,
}

impl Isa {
    /// The best of this machine.
    #[must_use]
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vnni");
            if avx512 && crate::linear::amx_is_here() {
                return Self::Amx;
            }
            if avx512 {
                return Self::Avx512;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return Self::Avx2;
            }
        }
        Self::Portable
    }
}

/// Defines `fn name(isa, arguments...)` that runs `$body`, an `#[inline(always)]` function of the
/// same arguments, as compiled for `isa`.
///
/// # Safety
/// As `$body` where that is unsafe; the caller of the safe form need only pass an [`Isa`] that
/// [`Isa::detect`] allows, which is the only way to come by one outside tests.
macro_rules! per_isa {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $type:ty),* $(,)?) = $body:path) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis unsafe fn $name(isa: $crate::isa::Isa, $($arg: $type),*) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
            #[allow(clippy::too_many_arguments)]
            unsafe fn avx512($($arg: $type),*) {
                // SAFETY: by contract of the outer function.
                #[allow(unused_unsafe)]
                unsafe { $body($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            #[allow(clippy::too_many_arguments)]
            unsafe fn avx2($($arg: $type),*) {
                // SAFETY: by contract of the outer function.
                #[allow(unused_unsafe)]
                unsafe { $body($($arg),*) }
            }
            // SAFETY: `isa` says that the processor has the features; the rest by contract.
            #[allow(unused_unsafe)]
            unsafe {
                match isa {
                    #[cfg(target_arch = "x86_64")]
                    $crate::isa::Isa::Avx512 | $crate::isa::Isa::Amx => avx512($($arg),*),
                    #[cfg(target_arch = "x86_64")]
                    $crate::isa::Isa::Avx2 => avx2($($arg),*),
                    _ => $body($($arg),*),
                }
            }
        }
    };
}
pub(crate) use per_isa;

//! NVRTC: the kernels compiled inside this process, with the library of the machine that runs them.
//!
//! The library is loaded when it is asked for; without it [`Nvrtc::open`] says so. Gives back cubins, never PTX, so
//! that what is cached is what runs. Refuses kernels that spill, as the offline compiler's step does.

use std::ffi::{CString, c_char, c_int};

use cudarc::nvrtc::sys;

use crate::CudaError;
use crate::cubins::ptxas_options;
use crate::images::{Compiler, Request};

/// What the library is asked for besides architecture, shapes and `cubins::ptxas_options`.
const OPTIONS: [&str; 3] = ["--std=c++17", "-lineinfo", "-default-device"];

/// The library, loaded.
#[derive(Clone, Copy, Debug)]
pub struct Nvrtc {
    version: (i32, i32),
}

fn refused(kernel: &str, reason: impl Into<String>) -> CudaError {
    CudaError::Compile {
        kernel: kernel.into(),
        reason: reason.into(),
    }
}

fn c_string(kernel: &str, text: &str) -> Result<CString, CudaError> {
    CString::new(text).map_err(|e| refused(kernel, format!("a zero byte in the source: {e}")))
}

/// A program; destroyed on the way out.
struct Program {
    handle: sys::nvrtcProgram,
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: made by nvrtcCreateProgram, destroyed once.
        unsafe { sys::nvrtcDestroyProgram(&mut self.handle) };
    }
}

impl Nvrtc {
    /// Loads the library.
    ///
    /// # Errors
    /// When there is none, or one older than 12 (it does not know sm_90a) or newer than 13 (its code
    /// may not load on the driver this was made for).
    pub fn open() -> Result<Self, CudaError> {
        let missing = |reason: String| refused("any kernel", reason);
        // SAFETY: only asks whether the library can be opened.
        if !unsafe { sys::is_culib_present() } {
            return Err(missing("libnvrtc is not installed".into()));
        }
        let (mut major, mut minor) = (0, 0);
        // SAFETY: writes two integers.
        let done = unsafe { sys::nvrtcVersion(&mut major, &mut minor) };
        match (done.result(), major) {
            (Ok(()), 12 | 13) => Ok(Self {
                version: (major, minor),
            }),
            (done, _) => Err(missing(format!(
                "libnvrtc {major}.{minor} ({done:?}): expected 12 or 13"
            ))),
        }
    }
}

impl Compiler for Nvrtc {
    fn identity(&self) -> String {
        let (major, minor) = self.version;
        format!("nvrtc {major}.{minor} {OPTIONS:?}")
    }

    fn compile(&self, request: &Request<'_>) -> Result<Vec<u8>, CudaError> {
        let kernel = request.kernel;
        let texts = request.texts();
        let program = create(kernel, &texts)?;
        let mut options = vec![format!("--gpu-architecture={}", request.arch)];
        options.extend(OPTIONS.map(String::from));
        let ptxas = ptxas_options(kernel).iter();
        options.extend(ptxas.map(|o| format!("--ptxas-options={o}")));
        options.extend(request.shape.defines());
        let options = options.iter().map(|o| c_string(kernel, o));
        let options = options.collect::<Result<Vec<_>, _>>()?;
        let pointers: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
        // SAFETY: the options live until the call returns.
        let done = unsafe {
            sys::nvrtcCompileProgram(program.handle, pointers.len() as c_int, pointers.as_ptr())
        };
        let log = log(&program, kernel)?;
        done.result()
            .map_err(|e| refused(kernel, format!("{e:?}: {log}")))?;
        let (size, get) = (sys::nvrtcGetCUBINSize, sys::nvrtcGetCUBIN);
        let image = text(&program, size, get).map_err(|e| refused(kernel, format!("{e:?}")))?;
        match image.is_empty() {
            true => Err(refused(kernel, "the library gave no cubin")),
            false => Ok(image),
        }
    }
}

/// The kernel with every header beside it.
fn create(kernel: &str, texts: &[(&str, &str)]) -> Result<Program, CudaError> {
    let source = texts.iter().find(|(name, _)| *name == kernel);
    let (_, source) = source.ok_or_else(|| refused(kernel, "no such source"))?;
    let (source, name) = (c_string(kernel, source)?, c_string(kernel, kernel)?);
    let headers = texts.iter().filter(|(name, _)| !name.ends_with(".cu"));
    let of = |(name, text): &(&str, &str)| Ok((c_string(kernel, name)?, c_string(kernel, text)?));
    let headers = headers.map(of).collect::<Result<Vec<_>, CudaError>>()?;
    let names: Vec<*const c_char> = headers.iter().map(|h| h.0.as_ptr()).collect();
    let texts: Vec<*const c_char> = headers.iter().map(|h| h.1.as_ptr()).collect();
    let mut handle = std::ptr::null_mut();
    // SAFETY: all strings live until the call returns; the library copies them.
    let done = unsafe {
        sys::nvrtcCreateProgram(
            &mut handle,
            source.as_ptr(),
            name.as_ptr(),
            names.len() as c_int,
            texts.as_ptr(),
            names.as_ptr(),
        )
    };
    done.result()
        .map_err(|e| refused(kernel, format!("{e:?}")))?;
    Ok(Program { handle })
}

type SizeOf = unsafe fn(sys::nvrtcProgram, *mut usize) -> sys::nvrtcResult;
type Get = unsafe fn(sys::nvrtcProgram, *mut c_char) -> sys::nvrtcResult;

/// Bytes that a pair of calls gives.
fn text(
    program: &Program,
    size_of: SizeOf,
    get: Get,
) -> Result<Vec<u8>, cudarc::nvrtc::result::NvrtcError> {
    let mut size = 0;
    // SAFETY: writes one integer.
    unsafe { size_of(program.handle, &mut size) }.result()?;
    let mut out = vec![0u8; size];
    // SAFETY: the buffer has the size that the library said.
    unsafe { get(program.handle, out.as_mut_ptr().cast()) }.result()?;
    Ok(out)
}

fn log(program: &Program, kernel: &str) -> Result<String, CudaError> {
    let (size, get) = (sys::nvrtcGetProgramLogSize, sys::nvrtcGetProgramLog);
    let bytes = text(program, size, get).map_err(|e| refused(kernel, format!("{e:?}")))?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    Ok(text.trim_end_matches('\0').to_owned())
}

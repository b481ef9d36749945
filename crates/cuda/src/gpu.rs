//! One GPU: context, module, memory, launch. The thin layer over the driver that tests and benches
//! use; the decoder's resident launch will be built on it.
//!
//! Refuses to start without a usable driver ([`Gpu::open`] says why). Invariant: nothing here runs
//! while a resident kernel does.

use std::sync::Arc;

use cudarc::driver::{
    CudaContext, CudaEvent, CudaFunction, CudaModule, CudaSlice, CudaStream, DeviceRepr,
    DriverError, LaunchConfig, PushKernelArg, sys,
};
use cudarc::nvrtc::Ptx;

use crate::CudaError;
use crate::layout::OpArgs;

// SAFETY: repr(C), integers only, no padding (layout.rs tests it).
unsafe impl DeviceRepr for OpArgs {}

/// An open GPU with one stream.
pub struct Gpu {
    context: Arc<CudaContext>,
    /// The stream that everything runs on.
    pub stream: Arc<CudaStream>,
}

pub(crate) fn driver(call: &'static str) -> impl Fn(DriverError) -> CudaError {
    move |e| CudaError::Driver {
        call,
        reason: e.to_string(),
    }
}

impl Gpu {
    /// Opens device `ordinal`.
    ///
    /// # Errors
    /// When there is no driver or no such device.
    pub fn open(ordinal: usize) -> Result<Self, CudaError> {
        // SAFETY: only asks whether the library can be opened.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::NoGpu("libcuda is not installed".into()));
        }
        let context = CudaContext::new(ordinal)
            .map_err(|e| CudaError::NoGpu(format!("device {ordinal}: {e}")))?;
        // SAFETY: one stream only, so there is nothing for events to order.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(driver("new stream"))?;
        Ok(Self { context, stream })
    }

    /// Makes this GPU the calling thread's: calls that name no stream need it.
    ///
    /// # Errors
    /// The driver's.
    pub fn bind(&self) -> Result<(), CudaError> {
        self.context
            .bind_to_thread()
            .map_err(driver("bind to thread"))
    }

    /// Lets kernels of this GPU read and write the memory of `other`.
    ///
    /// # Errors
    /// When there is no way from one to the other; the driver's.
    pub fn reach(&self, other: &Self) -> Result<(), CudaError> {
        let mut can = 0;
        let (from, to) = (self.context.cu_device(), other.context.cu_device());
        // SAFETY: `can` outlives the call.
        unsafe { sys::cuDeviceCanAccessPeer(&raw mut can, from, to) }
            .result()
            .map_err(driver("ask for peer access"))?;
        if can == 0 {
            let found = format!("GPUs {from} and {to}");
            return Err(CudaError::Shape {
                what: "GPUs of a group",
                expected: "that reach each other's memory".into(),
                found,
            });
        }
        self.bind()?;
        // SAFETY: both contexts are open.
        unsafe { sys::cuCtxEnablePeerAccess(other.context.cu_ctx(), 0) }
            .result()
            .map_err(driver("enable peer access"))
    }

    /// Multiprocessors: CTAs of a persistent grid.
    ///
    /// # Errors
    /// The driver's.
    pub fn multiprocessors(&self) -> Result<u32, CudaError> {
        let what = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let count = self.context.attribute(what).map_err(driver("attribute"))?;
        Ok(count as u32)
    }

    /// A function of a cubin, allowed `shared_bytes` of dynamic shared memory.
    ///
    /// # Errors
    /// The driver's.
    pub fn function(
        &self,
        image: &[u8],
        name: &str,
        shared_bytes: u32,
    ) -> Result<CudaFunction, CudaError> {
        Self::function_of(&self.module(image)?, name, shared_bytes)
    }

    /// A cubin, loaded.
    ///
    /// # Errors
    /// The driver's.
    pub fn module(&self, image: &[u8]) -> Result<Arc<CudaModule>, CudaError> {
        self.context
            .load_module(Ptx::from_binary(image.to_vec()))
            .map_err(driver("load module"))
    }

    /// A function of a loaded module.
    ///
    /// # Errors
    /// The driver's.
    pub fn function_of(
        module: &Arc<CudaModule>,
        name: &str,
        shared_bytes: u32,
    ) -> Result<CudaFunction, CudaError> {
        let function = module
            .load_function(name)
            .map_err(driver("load function"))?;
        let limit = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function
            .set_attribute(limit, shared_bytes as i32)
            .map_err(driver("shared memory limit"))?;
        Ok(function)
    }

    /// Copies `values` to the device.
    ///
    /// # Errors
    /// The driver's.
    pub fn upload<T: DeviceRepr>(&self, values: &[T]) -> Result<CudaSlice<T>, CudaError> {
        self.stream
            .clone_htod(values)
            .map_err(driver("copy to device"))
    }

    /// Copies a buffer back; waits for the stream.
    ///
    /// # Errors
    /// The driver's, a fault of an earlier kernel included.
    pub fn download<T: DeviceRepr + Default + Clone>(
        &self,
        values: &CudaSlice<T>,
    ) -> Result<Vec<T>, CudaError> {
        self.stream
            .clone_dtoh(values)
            .map_err(driver("copy to host"))
    }

    /// Launches `function` with one argument struct.
    ///
    /// # Safety
    /// The addresses in `args` are device memory of the sizes that the kernel reads and writes.
    ///
    /// # Errors
    /// The driver's.
    pub unsafe fn launch<A: DeviceRepr>(
        &self,
        function: &CudaFunction,
        shape: LaunchConfig,
        args: &A,
    ) -> Result<(), CudaError> {
        let mut launch = self.stream.launch_builder(function);
        launch.arg(args);
        // SAFETY: the caller's promise.
        unsafe { launch.launch(shape) }.map_err(driver("launch"))?;
        Ok(())
    }

    /// As [`Gpu::launch`], refused by the driver when the grid is not co-resident.
    ///
    /// # Safety
    /// As [`Gpu::launch`].
    ///
    /// # Errors
    /// The driver's.
    pub unsafe fn launch_cooperative<A: DeviceRepr>(
        &self,
        function: &CudaFunction,
        shape: LaunchConfig,
        args: &A,
    ) -> Result<(), CudaError> {
        let mut launch = self.stream.launch_builder(function);
        launch.arg(args);
        // SAFETY: the caller's promise.
        unsafe { launch.launch_cooperative(shape) }.map_err(driver("cooperative launch"))?;
        Ok(())
    }

    /// A mark behind everything on the stream.
    ///
    /// # Errors
    /// The driver's.
    pub fn mark(&self) -> Result<CudaEvent, CudaError> {
        self.stream
            .record_event(None)
            .map_err(driver("record event"))
    }

    /// Whether the stream has come to `mark`.
    ///
    /// # Errors
    /// The driver's, a fault of an earlier kernel included.
    pub fn reached(&self, mark: &CudaEvent) -> Result<bool, CudaError> {
        mark.try_is_complete().map_err(driver("query event"))
    }

    /// Waits for everything on the stream.
    ///
    /// # Errors
    /// The driver's, a fault of an earlier kernel included.
    pub fn wait(&self) -> Result<(), CudaError> {
        self.stream.synchronize().map_err(driver("synchronize"))
    }
}

/* Loads and launches compiled kernels, for CUDA and HIP.

   The driver's library is opened at run time and never linked, so this file compiles on a machine without a GPU. Only
   Python's stable interface is used, so one build serves every CPython from 3.10 on. */

#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cuda.h>
#include <dlfcn.h>
#include <stdalign.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* --- The driver --------------------------------------------------------------------------------------------------- */

typedef struct {
  const char *name; /* for messages */
  int (*module_load)(void **, const void *);
  int (*module_function)(void **, void *, const char *);
  /* CUDA only */
  CUresult (*error_string)(CUresult, const char **);
  CUresult (*current_context)(CUcontext *);
  CUresult (*set_context)(CUcontext);
  CUresult (*device)(CUdevice *, int);
  CUresult (*retain_context)(CUcontext *, CUdevice);
  CUresult (*device_attribute)(int *, CUdevice_attribute, CUdevice);
  CUresult (*function_attribute)(int *, CUfunction_attribute, CUfunction);
  CUresult (*set_function_attribute)(CUfunction, CUfunction_attribute, int);
  CUresult (*set_cache_config)(CUfunction, CUfunc_cache);
  CUresult (*launch)(const CUlaunchConfig *, CUfunction, void **, void **);
  CUresult (*encode_tiled)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                           const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                           CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  /* HIP only */
  const char *(*hip_error_string)(int);
  int (*hip_launch)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **,
                    void **);
} Driver;

typedef struct {
  const char *name;
  void **place;
} Symbol;

static const char *const CUDA_FILES[] = {"libcuda.so.1", NULL};
static const char *const HIP_FILES[] = {"libamdhip64.so", "libamdhip64.so.7", "libamdhip64.so.6", NULL};

/* Fills the places of `symbols` from the first of `files` that can be opened; false with a Python error otherwise. */
static int open_library(const char *const *files, const Symbol *symbols) {
  void *library = NULL;
  for (const char *const *file = files; *file && !library; ++file)
    library = dlopen(*file, RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    PyErr_Format(PyExc_RuntimeError, "the driver's library %s cannot be opened: is there a GPU driver?", files[0]);
    return 0;
  }
  for (const Symbol *symbol = symbols; symbol->name; ++symbol) {
    *symbol->place = dlsym(library, symbol->name);
    if (!*symbol->place) {
      PyErr_Format(PyExc_RuntimeError, "%s of the installed driver has no %s: update the driver", files[0],
                   symbol->name);
      return 0;
    }
  }
  return 1;
}

static Driver *cuda_driver(void) {
  static Driver driver = {.name = NULL};
  const Symbol symbols[] = {
      {"cuModuleLoadData", (void **)&driver.module_load},
      {"cuModuleGetFunction", (void **)&driver.module_function},
      {"cuGetErrorString", (void **)&driver.error_string},
      {"cuCtxGetCurrent", (void **)&driver.current_context},
      {"cuCtxSetCurrent", (void **)&driver.set_context},
      {"cuDeviceGet", (void **)&driver.device},
      {"cuDevicePrimaryCtxRetain", (void **)&driver.retain_context},
      {"cuDeviceGetAttribute", (void **)&driver.device_attribute},
      {"cuFuncGetAttribute", (void **)&driver.function_attribute},
      {"cuFuncSetAttribute", (void **)&driver.set_function_attribute},
      {"cuFuncSetCacheConfig", (void **)&driver.set_cache_config},
      {"cuLaunchKernelEx", (void **)&driver.launch},
      {"cuTensorMapEncodeTiled", (void **)&driver.encode_tiled},
      {NULL, NULL},
  };
  if (!driver.name) {
    if (!open_library(CUDA_FILES, symbols))
      return NULL;
    driver.name = "CUDA";
  }
  return &driver;
}

static Driver *hip_driver(void) {
  static Driver driver = {.name = NULL};
  const Symbol symbols[] = {
      {"hipModuleLoadData", (void **)&driver.module_load},
      {"hipModuleGetFunction", (void **)&driver.module_function},
      {"hipGetErrorString", (void **)&driver.hip_error_string},
      {"hipModuleLaunchKernel", (void **)&driver.hip_launch},
      {NULL, NULL},
  };
  if (!driver.name) {
    if (!open_library(HIP_FILES, symbols))
      return NULL;
    driver.name = "HIP";
  }
  return &driver;
}

/* Sets a Python error for a failed call of the driver. */
static void raise_driver_error(const Driver *driver, int code, const char *doing, const char *kernel) {
  const char *text = NULL;
  if (driver->hip_launch)
    text = driver->hip_error_string(code);
  else
    driver->error_string((CUresult)code, &text);
  PyErr_Format(PyExc_RuntimeError, "%s error %d while %s %s: %s", driver->name, code, doing, kernel,
               text ? text : "unknown");
}

/* --- Kernels ------------------------------------------------------------------------------------------------------ */

typedef struct {
  Driver *driver;
  void *function;
  char *name;
  char *form; /* one character per argument, see `read_arguments` */
  Py_ssize_t num_params;
  int device, num_threads, shared, pdl;
} Kernel;

static const char CAPSULE[] = "flexdecode.kernel";

static void free_kernel(Kernel *kernel) {
  free(kernel->name);
  free(kernel->form);
  free(kernel);
}

/* The machine code stays on the device: a CUDA graph may still launch it. */
static void destroy_capsule(PyObject *capsule) { free_kernel(PyCapsule_GetPointer(capsule, CAPSULE)); }

/* Makes the context of PyTorch current if this thread has none. */
static int ensure_context(const Kernel *kernel) {
  Driver *driver = kernel->driver;
  CUcontext context = NULL;
  CUdevice device;
  int code;
  if (driver->hip_launch)
    return 0; /* the HIP runtime does it */
  if ((code = driver->current_context(&context)) || context)
    return code;
  if ((code = driver->device(&device, kernel->device)) || (code = driver->retain_context(&context, device)))
    return code;
  return driver->set_context(context);
}

/* Lets a kernel use more shared memory than 48 KiB. Source: loadBinary of Triton's backends/nvidia/driver.c */
static int allow_shared(const Kernel *kernel) {
  Driver *driver = kernel->driver;
  CUfunction function = (CUfunction)kernel->function;
  CUdevice device;
  int code, most, own;
  if (driver->hip_launch || kernel->shared <= 48 * 1024)
    return 0;
  if ((code = driver->device(&device, kernel->device)) ||
      (code = driver->device_attribute(&most, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, device)) ||
      (code = driver->set_cache_config(function, CU_FUNC_CACHE_PREFER_SHARED)) ||
      (code = driver->function_attribute(&own, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function)))
    return code;
  return driver->set_function_attribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, most - own);
}

static int load_module(Kernel *kernel, const char *image) {
  void *module;
  int code;
  if ((code = ensure_context(kernel)) || (code = kernel->driver->module_load(&module, image)) ||
      (code = kernel->driver->module_function(&kernel->function, module, kernel->name)))
    return code;
  return allow_shared(kernel);
}

PyDoc_STRVAR(load_doc, "load(backend, name, image, form, device, num_threads, shared, pdl)\n\n"
                       "Loads machine code into a device and returns the kernel.");

static PyObject *load(PyObject *self, PyObject *arguments) {
  const char *backend, *name, *image, *form;
  Py_ssize_t size;
  int device, num_threads, shared, pdl, code;
  if (!PyArg_ParseTuple(arguments, "ssy#siiii", &backend, &name, &image, &size, &form, &device, &num_threads, &shared,
                        &pdl))
    return NULL;
  Driver *driver = strcmp(backend, "hip") ? cuda_driver() : hip_driver();
  if (!driver)
    return NULL;
  Kernel *kernel = calloc(1, sizeof(Kernel));
  if (!kernel || !(kernel->name = strdup(name)) || !(kernel->form = strdup(form))) {
    if (kernel)
      free_kernel(kernel);
    return PyErr_NoMemory();
  }
  kernel->driver = driver;
  kernel->device = device, kernel->num_threads = num_threads, kernel->shared = shared, kernel->pdl = pdl;
  for (const char *kind = form; *kind; ++kind)
    kernel->num_params += !strchr("x()", *kind);
  Py_BEGIN_ALLOW_THREADS;
  code = load_module(kernel, image);
  Py_END_ALLOW_THREADS;
  if (code) {
    raise_driver_error(driver, code, "loading", name);
    free_kernel(kernel);
    return NULL;
  }
  PyObject *capsule = PyCapsule_New(kernel, CAPSULE, destroy_capsule);
  if (!capsule)
    free_kernel(kernel);
  return capsule;
}

/* --- Launching ---------------------------------------------------------------------------------------------------- */

typedef union {
  uint64_t word;
  int32_t i32;
  int8_t i8;
  int16_t i16;
  int64_t i64;
  float f32;
  double f64;
  char *map;
} Value;

/* Reads one argument; false with a Python error if it has another type or does not fit. */
static int read_value(char kind, PyObject *argument, Value *value) {
  switch (kind) {
  case 'P': /* an address, or None */
    value->word = argument == Py_None ? 0 : PyLong_AsUnsignedLongLong(argument);
    break;
  case 'l':
    value->i64 = PyLong_AsLongLong(argument);
    break;
  case 'f':
    value->f32 = (float)PyFloat_AsDouble(argument);
    break;
  case 'd':
    value->f64 = PyFloat_AsDouble(argument);
    break;
  case 'T': /* a tensor descriptor, which `encode` made */
    if (!PyBytes_Check(argument) || PyBytes_Size(argument) != sizeof(CUtensorMap)) {
      PyErr_SetString(PyExc_TypeError, "a descriptor must be what encode() made");
      return 0;
    }
    value->map = PyBytes_AsString(argument);
    break;
  default: {
    long long number = PyLong_AsLongLong(argument);
    int bits = kind == 'i' ? 32 : kind == 'h' ? 16 : 8;
    if (number < -(1LL << (bits - 1)) || number >= 1LL << bits) {
      PyErr_Format(PyExc_OverflowError, "%lld does not fit into %d bits", number, bits);
      return 0;
    }
    value->i64 = number; /* little endian: the first bytes are those of the narrower type */
  }
  }
  return !PyErr_Occurred();
}

/* Reads a tuple or list of arguments by their kinds: `x` is skipped, `(` and `)` enclose those of a tuple. */
static int read_arguments(const char **form, PyObject *arguments, Value **values) {
  int is_list = PyList_Check(arguments);
  if (!is_list && !PyTuple_Check(arguments)) {
    PyErr_SetString(PyExc_TypeError, "arguments must be a tuple");
    return 0;
  }
  Py_ssize_t count = is_list ? PyList_Size(arguments) : PyTuple_Size(arguments), place = 0;
  for (; **form && **form != ')' && place < count; ++place) {
    char kind = *(*form)++;
    PyObject *argument = is_list ? PyList_GetItem(arguments, place) : PyTuple_GetItem(arguments, place);
    if (kind == '(') {
      if (!read_arguments(form, argument, values))
        return 0;
      ++*form; /* the bracket that closes */
    } else if (kind != 'x') {
      if (!read_value(kind, argument, *values))
        return 0;
      ++*values;
    }
  }
  if (place != count || (**form && **form != ')')) {
    PyErr_SetString(PyExc_TypeError, "the number of arguments is not that of the kernel");
    return 0;
  }
  return 1;
}

static int launch_kernel(const Kernel *kernel, unsigned grid_x, unsigned grid_y, void *stream, void **params) {
  int code = ensure_context(kernel);
  if (code)
    return code;
  if (kernel->driver->hip_launch)
    return kernel->driver->hip_launch(kernel->function, grid_x, grid_y, 1, kernel->num_threads, 1, 1, kernel->shared,
                                      stream, params, NULL);
  CUlaunchAttribute attribute = {.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION};
  attribute.value.programmaticStreamSerializationAllowed = 1;
  CUlaunchConfig config = {
      .gridDimX = grid_x, .gridDimY = grid_y, .gridDimZ = 1,
      .blockDimX = kernel->num_threads, .blockDimY = 1, .blockDimZ = 1,
      .sharedMemBytes = kernel->shared, .hStream = (CUstream)stream,
      .attrs = &attribute, .numAttrs = kernel->pdl ? 1 : 0,
  };
  return kernel->driver->launch(&config, (CUfunction)kernel->function, params, NULL);
}

PyDoc_STRVAR(launch_doc, "launch(kernel, grid_x, grid_y, stream, arguments)\n\nLaunches a kernel; returns at once.");

static PyObject *launch(PyObject *self, PyObject *const *given, Py_ssize_t count) {
  if (count != 5) {
    PyErr_Format(PyExc_TypeError, "launch takes 5 arguments, got %zd", count);
    return NULL;
  }
  Kernel *kernel = PyCapsule_GetPointer(given[0], CAPSULE);
  if (!kernel)
    return NULL;
  unsigned long grid_x = PyLong_AsUnsignedLong(given[1]), grid_y = PyLong_AsUnsignedLong(given[2]);
  void *stream = (void *)(uintptr_t)PyLong_AsUnsignedLongLong(given[3]);
  if (PyErr_Occurred())
    return NULL;
  Py_ssize_t num_params = kernel->num_params;
  Value values[num_params + 2], *end = values;
  void *params[num_params + 2];
  const char *form = kernel->form;
  if (!read_arguments(&form, given[4], &end))
    return NULL;
  alignas(128) char maps[2][sizeof(CUtensorMap)];
  int num_maps = 0;
  const char *kind = kernel->form;
  for (Py_ssize_t i = 0; i < num_params; ++i, ++kind) {
    while (strchr("x()", *kind))
      ++kind;
    params[i] = &values[i];
    if (*kind == 'T') {
      if (num_maps == 2) {
        PyErr_SetString(PyExc_TypeError, "a kernel has at most two descriptors");
        return NULL;
      }
      params[i] = memcpy(maps[num_maps++], values[i].map, sizeof(CUtensorMap));
    }
  }
  for (Py_ssize_t i = num_params; i < num_params + 2; ++i) { /* Triton's two scratch buffers, which no kernel here uses */
    values[i].word = 0;
    params[i] = &values[i];
  }
  int code = 0;
  if (grid_x && grid_y) {
    Py_BEGIN_ALLOW_THREADS;
    code = launch_kernel(kernel, grid_x, grid_y, stream, params);
    Py_END_ALLOW_THREADS;
  }
  if (code) {
    raise_driver_error(kernel->driver, code, "launching", kernel->name);
    return NULL;
  }
  Py_INCREF(Py_None);
  return Py_None;
}

PyDoc_STRVAR(encode_doc, "encode(address, swizzle, element_size, element_type, block, rows, columns, pitch)\n\n"
                         "Encodes the tensor descriptor of a matrix; sizes and pitch in elements.");

/* Source: fillTMADescriptor of Triton's backends/nvidia/driver.c */
static PyObject *encode(PyObject *self, PyObject *arguments) {
  unsigned long long address, rows, columns, pitch;
  unsigned block_rows, block_columns;
  int swizzle, element_size, element_type;
  if (!PyArg_ParseTuple(arguments, "Kiii(II)KKK", &address, &swizzle, &element_size, &element_type, &block_rows,
                        &block_columns, &rows, &columns, &pitch))
    return NULL;
  Driver *driver = cuda_driver();
  if (!driver)
    return NULL;
  alignas(128) CUtensorMap map;
  const cuuint64_t shape[2] = {columns, rows}, strides[2] = {pitch * element_size, rows * pitch * element_size};
  const cuuint32_t block[2] = {block_columns, block_rows}, steps[2] = {1, 1};
  CUresult code = driver->encode_tiled(&map, (CUtensorMapDataType)element_type, 2, (void *)(uintptr_t)address, shape,
                                       strides, block, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                       (CUtensorMapSwizzle)swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                                       CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (code) {
    raise_driver_error(driver, code, "encoding", "a tensor descriptor");
    return NULL;
  }
  return PyBytes_FromStringAndSize((const char *)&map, sizeof(map));
}

/* --- The module --------------------------------------------------------------------------------------------------- */

static PyMethodDef FUNCTIONS[] = {
    {"load", load, METH_VARARGS, load_doc},
    {"launch", (PyCFunction)(void (*)(void))launch, METH_FASTCALL, launch_doc},
    {"encode", encode, METH_VARARGS, encode_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT, .m_name = "flexdecode_launcher", .m_size = -1, .m_methods = FUNCTIONS};

PyMODINIT_FUNC PyInit_flexdecode_launcher(void) { return PyModule_Create(&MODULE); }

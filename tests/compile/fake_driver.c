/* A driver that launches nothing: it writes what it is told to do as lines of the file that FAKE_DRIVER_LOG names, if it
   names one. */

#include <cuda.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  char name[64];
  int num_sizes, sizes[512];
} Function;

static Function functions[64];
static int num_told, num_found;
static CUcontext context;

static FILE *log_file(void) {
  const char *name = getenv("FAKE_DRIVER_LOG");
  return fopen(name ? name : "/dev/null", "a");
}

/* Says how many bytes each parameter of a kernel has; told in the order in which the kernels are loaded. */
void fake_tell_sizes(int count, const int *sizes) {
  functions[num_told].num_sizes = count;
  memcpy(functions[num_told++].sizes, sizes, count * sizeof(int));
}

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = 12080, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *found) { return *found = context, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext given) { return context = given, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) { return *status = 0, CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *found, CUdevice device) {
  return *found = (CUcontext)(uintptr_t)(device + 1), CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult code, const char **text) { return *text = "made up", CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  return *value = 232448, CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  return *value = 1024, CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
    return CUDA_ERROR_INVALID_VALUE; /* as drivers that do not know Triton's newer attributes */
  FILE *file = log_file();
  fprintf(file, "shared %d\n", value);
  return fclose(file), CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  return *(CUdeviceptr *)data = pointer, CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config) {
  return *clusters = 1, CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)1;
  return memcmp(image, "\177ELF", 4) ? CUDA_ERROR_INVALID_IMAGE : CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  strncpy(functions[num_found].name, name, 63);
  return *function = (CUfunction)&functions[num_found++], CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *shape, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  uint64_t words[16] = {type,   rank,   (uint64_t)address, shape[0],   shape[1], strides[0], box[0],
                        box[1], steps[0], steps[1],        interleave, swizzle,  promotion,  fill};
  return memcpy(map, words, sizeof(words)), CUDA_SUCCESS;
}

static void log_params(FILE *file, const Function *launched, void **params) {
  fprintf(file, " params");
  for (int i = 0; i < launched->num_sizes; ++i) {
    fprintf(file, " ");
    for (int j = 0; j < launched->sizes[i]; ++j)
      fprintf(file, "%02x", ((const unsigned char *)params[i])[j]);
  }
  fprintf(file, "\n");
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **params, void **extra) {
  const Function *launched = (const Function *)function;
  if (!getenv("FAKE_DRIVER_LOG"))
    return CUDA_SUCCESS;
  FILE *file = log_file();
  fprintf(file, "%s grid %u %u %u block %u %u %u shared %u stream %p attributes", launched->name,
          config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX, config->blockDimY,
          config->blockDimZ, config->sharedMemBytes, (void *)config->hStream);
  for (unsigned i = 0; i < config->numAttrs; ++i)
    fprintf(file, " %d=%d", config->attrs[i].id, config->attrs[i].value.programmaticStreamSerializationAllowed);
  log_params(file, launched, params);
  return fclose(file), CUDA_SUCCESS;
}

/* --- The same for HIP --------------------------------------------------------------------------------------------- */

const char *hipGetErrorString(int code) { return "made up"; }
int hipModuleLoadData(void **module, const void *image) { return cuModuleLoadData((CUmodule *)module, image); }
int hipModuleGetFunction(void **function, void *module, const char *name) {
  return cuModuleGetFunction((CUfunction *)function, (CUmodule)module, name);
}
int hipModuleLaunchKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                          unsigned block_y, unsigned block_z, unsigned shared, void *stream, void **params,
                          void **extra) {
  FILE *file = log_file();
  fprintf(file, "%s grid %u %u %u block %u %u %u shared %u stream %p", ((const Function *)function)->name, grid_x,
          grid_y, grid_z, block_x, block_y, block_z, shared, stream);
  log_params(file, function, params);
  return fclose(file), 0;
}

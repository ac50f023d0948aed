/* A stand-in for the driver's libnvidia-ml.so.1: answers the calls that this project makes, from a scenario.
 *
 * NVML_STANDIN names a text file, read at nvmlInit; without it there is no driver. One statement a line:
 *
 *   driver 580.65.06              version of the driver
 *   cuda 13000                    the CUDA version that it offers
 *   gpu UUID MAJOR MINOR MIB MODE NAME    a GPU; MODE is 1 in MIG mode
 *   mig UUID INSTANCE COMPUTE MIB NAME    a MIG device of the GPU before it
 *   refuse CALL CODE UUID|*       that call answers CODE (13: this driver has no such call), for that device or for all
 *
 * tests/nvml_standin.py writes scenarios and compiles this file.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, DRIVER_NOT_LOADED = 9 };
enum { MOST = 32, TEXT = 96 };

typedef struct Device {
    char uuid[TEXT], name[TEXT];
    int major, minor, mig_mode, instance, compute;
    unsigned long long mebibytes;
    struct Device *parent;
} Device;

typedef struct { unsigned long long total, unused, used; } Memory;
typedef struct { unsigned int gpu, memory; } Utilization;
typedef struct { char call[TEXT], uuid[TEXT]; int code; } Refusal;

static Device devices[MOST];
static Refusal refusals[MOST];
static int device_count, refusal_count, cuda, initialised;
static char driver[TEXT];

static void read_line(const char *line) {
    Device *next = &devices[device_count];
    Refusal *refusal = &refusals[refusal_count];
    if (sscanf(line, "driver %95s", driver) == 1 || sscanf(line, "cuda %d", &cuda) == 1) return;
    memset(next, 0, sizeof *next);
    if (sscanf(line, "gpu %95s %d %d %llu %d %95[^\n]", next->uuid, &next->major, &next->minor, &next->mebibytes,
               &next->mig_mode, next->name) == 6) {
        device_count++;
    } else if (sscanf(line, "mig %95s %d %d %llu %95[^\n]", next->uuid, &next->instance, &next->compute,
                      &next->mebibytes, next->name) == 5) {
        Device *parent = next - 1;
        next->parent = parent->parent ? parent->parent : parent;
        device_count++;
    } else if (sscanf(line, "refuse %95s %d %95s", refusal->call, &refusal->code, refusal->uuid) == 3) {
        refusal_count++;
    }
}

/* Return the code that the scenario has this call answer, OK without one. */
static int refused(const char *call, const Device *device) {
    for (int i = 0; i < refusal_count; i++) {
        const Refusal *each = &refusals[i];
        int meant = !strcmp(each->uuid, "*") || (device && !strcmp(each->uuid, device->uuid));
        if (meant && !strcmp(each->call, call)) return each->code;
    }
    return OK;
}

#define ANSWER(device)                               \
    do {                                             \
        int code_ = refused(__func__, device);       \
        if (code_) return code_;                     \
        if (!initialised) return 1;                  \
    } while (0)

static int copy(char *to, const char *from, unsigned int length) {
    if (strlen(from) >= length) return 7;
    strcpy(to, from);
    return OK;
}

int nvmlInitWithFlags(unsigned int flags) {
    const char *path = getenv("NVML_STANDIN");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[512];
    (void)flags;
    if (!file) return DRIVER_NOT_LOADED;
    device_count = refusal_count = cuda = 0;
    while (fgets(line, sizeof line, file)) read_line(line);
    fclose(file);
    if (refused(__func__, NULL)) return refused(__func__, NULL);
    initialised++;
    return OK;
}

/* torch counts GPUs by this one. */
int nvmlInit(void) { return nvmlInitWithFlags(0); }

int nvmlShutdown(void) {
    ANSWER(NULL);
    initialised--;
    return OK;
}

const char *nvmlErrorString(int code) { return code == 26 ? "Deprecated" : "an error that only the library names"; }

int nvmlSystemGetDriverVersion(char *version, unsigned int length) {
    ANSWER(NULL);
    return copy(version, driver, length);
}

int nvmlSystemGetCudaDriverVersion(int *version) {
    ANSWER(NULL);
    *version = cuda;
    return OK;
}

int nvmlSystemGetCudaDriverVersion_v2(int *version) {
    ANSWER(NULL);
    *version = cuda;
    return OK;
}

int nvmlDeviceGetCount_v2(unsigned int *count) {
    ANSWER(NULL);
    *count = 0;
    for (int i = 0; i < device_count; i++) *count += !devices[i].parent;
    return OK;
}

static int child(const Device *parent, unsigned int index, Device **found) {
    for (int i = 0; i < device_count; i++)
        if (devices[i].parent == parent && index-- == 0) return *found = &devices[i], OK;
    return NOT_FOUND;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, Device **found) {
    int code = child(NULL, index, found);
    ANSWER(code ? NULL : *found);
    return code ? INVALID_ARGUMENT : OK;
}

int nvmlDeviceGetName(Device *device, char *name, unsigned int length) {
    ANSWER(device);
    return copy(name, device->name, length);
}

int nvmlDeviceGetUUID(Device *device, char *uuid, unsigned int length) {
    ANSWER(device);
    return copy(uuid, device->uuid, length);
}

int nvmlDeviceGetMemoryInfo(Device *device, Memory *memory) {
    ANSWER(device);
    memory->total = device->mebibytes << 20;
    memory->used = memory->total / 4;
    memory->unused = memory->total - memory->used;
    return OK;
}

int nvmlDeviceGetCudaComputeCapability(Device *device, int *major, int *minor) {
    ANSWER(device);
    const Device *gpu = device->parent ? device->parent : device;
    *major = gpu->major;
    *minor = gpu->minor;
    return OK;
}

/* Not supported on a GPU in MIG mode, nor on its MIG devices, as the real one. */
int nvmlDeviceGetUtilizationRates(Device *device, Utilization *rates) {
    ANSWER(device);
    if (device->mig_mode || device->parent) return NOT_SUPPORTED;
    rates->gpu = 25;
    rates->memory = 5;
    return OK;
}

int nvmlDeviceGetTemperature(Device *device, int sensor, unsigned int *celsius) {
    ANSWER(device);
    (void)sensor;
    if (device->parent) return INVALID_ARGUMENT;
    *celsius = 40;
    return OK;
}

int nvmlDeviceGetMaxMigDeviceCount(Device *device, unsigned int *count) {
    ANSWER(device);
    *count = device->mig_mode ? 7 : 0;
    return OK;
}

int nvmlDeviceGetMigDeviceHandleByIndex(Device *device, unsigned int index, Device **found) {
    int code = child(device, index, found);
    ANSWER(code ? NULL : *found);
    return code;
}

int nvmlDeviceGetGpuInstanceId(Device *device, unsigned int *id) {
    ANSWER(device);
    *id = (unsigned int)device->instance;
    return OK;
}

int nvmlDeviceGetComputeInstanceId(Device *device, unsigned int *id) {
    ANSWER(device);
    *id = (unsigned int)device->compute;
    return OK;
}

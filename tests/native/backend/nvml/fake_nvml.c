/* Stands for libnvidia-ml: three GPUs, of which the first two are joined by NVLink. */
#include <string.h>

struct device {
    const char *pci_address, *uuid;
};
static struct device devices[] = {
    {"0000:18:00.0", "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"},
    {"0000:2a:00.0", "GPU-f0f1f2f3-f4f5-f6f7-f8f9-fafbfcfdfeff"},
    {"0000:3c:00.0", "GPU-11111111-1111-1111-1111-111111111111"},
};
enum { kSuccess = 0, kUninitialized = 1, kNotFound = 6, kCount = 3, kNvlink = 2, kOk = 0, kNo = 3 };
static int initialized = 0;

int nvmlInit_v2(void);
int nvmlDeviceGetHandleByPciBusId_v2(const char *address, struct device **device);
int nvmlDeviceGetHandleByUUID(const char *uuid, struct device **device);
int nvmlDeviceGetUUID(struct device *device, char *uuid, unsigned bytes);
int nvmlDeviceGetP2PStatus(struct device *one, struct device *other, int index, int *status);

int nvmlInit_v2(void) {
    initialized = 1;
    return kSuccess;
}

int nvmlDeviceGetHandleByPciBusId_v2(const char *address, struct device **device) {
    if (!initialized) return kUninitialized;
    for (int i = 0; i < kCount; ++i)
        if (strcmp(devices[i].pci_address, address) == 0) {
            *device = &devices[i];
            return kSuccess;
        }
    return kNotFound;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, struct device **device) {
    if (!initialized) return kUninitialized;
    for (int i = 0; i < kCount; ++i)
        if (strcmp(devices[i].uuid, uuid) == 0) {
            *device = &devices[i];
            return kSuccess;
        }
    return kNotFound;
}

int nvmlDeviceGetUUID(struct device *device, char *uuid, unsigned bytes) {
    if (strlen(device->uuid) >= bytes) return kNotFound;
    strcpy(uuid, device->uuid);
    return kSuccess;
}

int nvmlDeviceGetP2PStatus(struct device *one, struct device *other, int index, int *status) {
    const long sum = (one - devices) + (other - devices);
    *status = index != kNvlink || sum == 1 ? kOk : kNo;
    return kSuccess;
}

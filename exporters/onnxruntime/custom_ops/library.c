/* Kernel nodes as custom operators of ONNX Runtime, launched by the CUDA driver.
 *
 * What an operator is comes as tables (tables.py, which lays out the same structures): sizes as formulas, and for each
 * number of tokens a kernel in PTX. `surgeon_offer` hands tables over; ONNX Runtime's next call of `RegisterCustomOps`
 * registers them. ONNX Runtime's C interface is a table of functions whose places never change; those that are needed
 * are named here, so that no header of it is.
 */
#include <dlfcn.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define MOST_INPUTS 16
#define MOST_OUTPUTS 4
#define MOST_SIZES 8
#define MOST_RANK 8
#define DEEPEST 16 /* values that a formula holds at a time */
#define UNASKED_SHARED (48 << 10) /* bytes of shared memory that every kernel may have */
#define MAX_DYNAMIC_SHARED 8 /* CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES */

/* ---- tables ---------------------------------------------------------------------------------------------------- */
enum { NUMBER, DIMENSION, ADD, MULTIPLY, DIVIDE };

typedef struct {
    const int64_t *words; /* postfix: pairs of a kind and its operand: a number, or 256 * input + axis */
    int32_t count;        /* of pairs */
} Formula;

typedef struct {
    int64_t tokens; /* up to how many, by the first of the operator's sizes; negative: any */
    Formula grid[3];
    const char *entry, *ptx;
    uint32_t threads, shared;
} Variant;

typedef struct {
    const char *name;
    int32_t num_inputs, num_outputs, num_sizes;
    const int32_t *input_types, *output_types, *output_ranks;
    const Formula *sizes, *output_dims; /* the latter of all outputs, one after another */
    const Variant *variants; /* the last takes any number of tokens */
} Operator;

typedef struct {
    const char *domain, *provider, *driver;
    int32_t alignment; /* bytes that every address is a multiple of */
    int32_t num_operators;
    const Operator *operators;
} Table;

/* ---- ONNX Runtime ---------------------------------------------------------------------------------------------- */
typedef struct Status Status;
typedef struct Value Value;
typedef struct Shape Shape;
typedef struct Context Context;
typedef struct Domain Domain;
typedef struct Options Options;
typedef void (*Function)(void);
typedef Function const *Api;
typedef struct {
    Api (*get_api)(uint32_t version);
    const char *(*version)(void);
} ApiBase;

enum {
    CREATE_STATUS = 0,
    CREATE_DOMAIN = 26,
    DOMAIN_ADD = 27,
    ADD_DOMAIN = 28,
    TENSOR_DATA = 51,
    DIMENSIONS_COUNT = 61,
    DIMENSIONS = 62,
    TYPE_AND_SHAPE = 65,
    CONTEXT_INPUT = 90,
    CONTEXT_OUTPUT = 91,
    RELEASE_SHAPE = 99,
    CONTEXT_STREAM = 193,
    API_VERSION = 16
};
enum { FAIL = 1 };

typedef Status *(*CreateStatus)(int code, const char *message);
typedef Status *(*CreateDomain)(const char *name, Domain **);
typedef Status *(*DomainAdd)(Domain *, const void *op);
typedef Status *(*AddDomain)(Options *, Domain *);
typedef Status *(*TensorData)(Value *, void **);
typedef Status *(*DimensionsCount)(const Shape *, size_t *);
typedef Status *(*Dimensions)(const Shape *, int64_t *, size_t);
typedef Status *(*TypeAndShape)(const Value *, Shape **);
typedef Status *(*ContextInput)(const Context *, size_t, const Value **);
typedef Status *(*ContextOutput)(Context *, size_t, const int64_t *, size_t, Value **);
typedef void (*ReleaseShape)(Shape *);
typedef Status *(*ContextStream)(const Context *, void **);

/* ONNX Runtime's interface of a custom operator: its structure of that name, as of version 16, and room for what later
 * versions added behind it, which a version of 16 says is not there. */
typedef struct CustomOp {
    uint32_t version;
    void *(*create_kernel)(const struct CustomOp *, Api, const void *info);
    const char *(*name)(const struct CustomOp *);
    const char *(*provider)(const struct CustomOp *);
    int (*input_type)(const struct CustomOp *, size_t);
    size_t (*num_inputs)(const struct CustomOp *);
    int (*output_type)(const struct CustomOp *, size_t);
    size_t (*num_outputs)(const struct CustomOp *);
    void (*compute_without_status)(void *, Context *);
    void (*destroy_kernel)(void *);
    int (*input_characteristic)(const struct CustomOp *, size_t);
    int (*output_characteristic)(const struct CustomOp *, size_t);
    int (*input_memory)(const struct CustomOp *, size_t);
    int (*variadic_inputs)(const struct CustomOp *);
    int (*variadic_inputs_alike)(const struct CustomOp *);
    int (*variadic_outputs)(const struct CustomOp *);
    int (*variadic_outputs_alike)(const struct CustomOp *);
    Status *(*create_kernel_with_status)(const struct CustomOp *, Api, const void *info, void **);
    Status *(*compute)(void *, Context *);
    Function later[16];
} CustomOp;

/* ---- CUDA's driver --------------------------------------------------------------------------------------------- */
typedef struct {
    int (*context)(void **);
    int (*load)(void **module, const void *ptx);
    int (*unload)(void *module);
    int (*function)(void **function, void *module, const char *name);
    int (*set)(void *function, int attribute, int value);
    int (*launch)(void *function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned shared,
                  void *stream, void **arguments, void **extra);
} Driver;

static int open_driver(const char *path, Driver *driver) {
    void *library = dlopen(path, RTLD_NOW);
    if (library == NULL) return 0;
    *(void **)&driver->context = dlsym(library, "cuCtxGetCurrent");
    *(void **)&driver->load = dlsym(library, "cuModuleLoadData");
    *(void **)&driver->unload = dlsym(library, "cuModuleUnload");
    *(void **)&driver->function = dlsym(library, "cuModuleGetFunction");
    *(void **)&driver->set = dlsym(library, "cuFuncSetAttribute");
    *(void **)&driver->launch = dlsym(library, "cuLaunchKernel");
    return driver->context && driver->load && driver->unload && driver->function && driver->set && driver->launch;
}

/* ---- an operator, and its kernels ------------------------------------------------------------------------------ */
typedef struct Loaded {
    const Variant *variant;
    void *context, *module, *function;
    struct Loaded *next;
} Loaded;

/* One for each operator of a session's tables. It lives on: sessions keep pointers to it, and do not say how long. */
typedef struct {
    CustomOp op; /* must come first: ONNX Runtime gets its address */
    const Table *table;
    const Operator *operator;
    Driver driver;
    Api api;
    pthread_mutex_t lock;
    Loaded *loaded;
    int nodes; /* whose kernels there are; the last one unloads */
} Registered;

static const Registered *of(const CustomOp *op) { return (const Registered *)op; }

static Status *fail(const Registered *self, const char *reason, int code) {
    char message[256];
    snprintf(message, sizeof message, "%s: %s (%d)", self->operator->name, reason, code);
    return ((CreateStatus)self->api[CREATE_STATUS])(FAIL, message);
}

static int64_t evaluate(Formula formula, int64_t dims[][MOST_RANK]) {
    int64_t stack[DEEPEST];
    int top = 0;
    for (int n = 0; n < formula.count; n++) {
        int64_t kind = formula.words[2 * n], word = formula.words[2 * n + 1];
        if (kind == NUMBER) {
            stack[top++] = word;
        } else if (kind == DIMENSION) {
            stack[top++] = dims[word / 256][word % 256];
        } else {
            int64_t b = stack[--top], *a = &stack[top - 1];
            *a = kind == ADD ? *a + b : kind == MULTIPLY ? *a * b : *a / b;
        }
    }
    return stack[0];
}

/* The kernel of a variant in the current context, loaded where it is not yet. */
static Status *find(Registered *self, const Variant *variant, void **function) {
    void *context = NULL;
    int code = self->driver.context(&context);
    if (code) return fail(self, "cuCtxGetCurrent", code);
    pthread_mutex_lock(&self->lock);
    Loaded *kernel = self->loaded;
    while (kernel && (kernel->variant != variant || kernel->context != context)) kernel = kernel->next;
    const char *failed = NULL;
    if (kernel == NULL) {
        Loaded loaded = {variant, context, NULL, NULL, self->loaded};
        if ((code = self->driver.load(&loaded.module, variant->ptx))) failed = "cuModuleLoadData";
        else if ((code = self->driver.function(&loaded.function, loaded.module, variant->entry))) failed = "cuModuleGetFunction";
        else if (variant->shared > UNASKED_SHARED &&
                 (code = self->driver.set(loaded.function, MAX_DYNAMIC_SHARED, (int)variant->shared)))
            failed = "cuFuncSetAttribute";
        else if ((kernel = malloc(sizeof *kernel)) == NULL) failed = "out of memory";
        if (kernel) *kernel = loaded, self->loaded = kernel;
        else if (loaded.module) self->driver.unload(loaded.module);
    }
    pthread_mutex_unlock(&self->lock);
    if (failed) return fail(self, failed, code);
    *function = kernel->function;
    return NULL;
}

static Status *read_input(const Registered *self, const Context *context, size_t number, int64_t *dims, void **data) {
    Api api = self->api;
    const Value *value = NULL;
    Shape *shape = NULL;
    size_t rank = 0;
    Status *status = ((ContextInput)api[CONTEXT_INPUT])(context, number, &value);
    if (status) return status;
    if (value == NULL) return fail(self, "an input is missing", (int)number);
    if ((status = ((TypeAndShape)api[TYPE_AND_SHAPE])(value, &shape))) return status;
    status = ((DimensionsCount)api[DIMENSIONS_COUNT])(shape, &rank);
    if (!status && rank > MOST_RANK) status = fail(self, "an input has too many dimensions", (int)rank);
    if (!status) status = ((Dimensions)api[DIMENSIONS])(shape, dims, rank);
    ((ReleaseShape)api[RELEASE_SHAPE])(shape);
    return status ? status : ((TensorData)api[TENSOR_DATA])((Value *)value, data);
}

static Status *compute(void *kernel, Context *context) {
    Registered *self = kernel;
    const Operator *operator = self->operator;
    int64_t dims[MOST_INPUTS][MOST_RANK];
    void *pointers[MOST_INPUTS + MOST_OUTPUTS];
    int32_t sizes[MOST_SIZES];
    void *arguments[MOST_INPUTS + MOST_SIZES + MOST_OUTPUTS], **next = arguments;
    Status *status;
    for (int n = 0; n < operator->num_inputs; n++) {
        if ((status = read_input(self, context, (size_t)n, dims[n], &pointers[n]))) return status;
        *next++ = &pointers[n];
    }
    for (int n = 0; n < operator->num_sizes; n++) {
        sizes[n] = (int32_t)evaluate(operator->sizes[n], dims);
        *next++ = &sizes[n];
    }

    const Variant *variant = operator->variants;
    while (variant->tokens >= 0 && variant->tokens < sizes[0]) variant++;
    const Formula *dim = operator->output_dims;
    for (int n = 0; n < operator->num_outputs; n++) {
        int64_t shape[MOST_RANK];
        Value *value = NULL;
        void **pointer = &pointers[operator->num_inputs + n];
        size_t rank = (size_t)operator->output_ranks[n];
        for (size_t axis = 0; axis < rank; axis++) shape[axis] = evaluate(*dim++, dims);
        status = ((ContextOutput)self->api[CONTEXT_OUTPUT])(context, (size_t)n, shape, rank, &value);
        if (!status) status = ((TensorData)self->api[TENSOR_DATA])(value, pointer);
        if (status) return status;
        *next++ = pointer;
    }
    for (int n = 0; n < operator->num_inputs + operator->num_outputs; n++)
        if ((uintptr_t)pointers[n] % (uintptr_t)self->table->alignment)
            return fail(self, "a tensor is not placed at a multiple of 16 bytes", n);

    unsigned grid[3];
    for (int axis = 0; axis < 3; axis++)
        if ((grid[axis] = (unsigned)evaluate(variant->grid[axis], dims)) == 0) return NULL;
    void *function = NULL, *stream = NULL;
    if ((status = ((ContextStream)self->api[CONTEXT_STREAM])(context, &stream))) return status;
    if ((status = find(self, variant, &function))) return status;
    int code = self->driver.launch(function, grid[0], grid[1], grid[2], variant->threads, 1, 1, variant->shared, stream,
                                   arguments, NULL);
    return code ? fail(self, "cuLaunchKernel", code) : NULL;
}

static Status *create_kernel(const CustomOp *op, Api api, const void *info, void **kernel) {
    Registered *self = (Registered *)op;
    (void)api, (void)info;
    pthread_mutex_lock(&self->lock);
    self->nodes++;
    pthread_mutex_unlock(&self->lock);
    *kernel = self;
    return NULL;
}

static void destroy_kernel(void *kernel) {
    Registered *self = kernel;
    pthread_mutex_lock(&self->lock);
    if (--self->nodes == 0)
        while (self->loaded) {
            Loaded *gone = self->loaded;
            self->loaded = gone->next;
            self->driver.unload(gone->module);
            free(gone);
        }
    pthread_mutex_unlock(&self->lock);
}

static const char *name(const CustomOp *op) { return of(op)->operator->name; }
static const char *provider(const CustomOp *op) { return of(op)->table->provider; }
static int input_type(const CustomOp *op, size_t n) { return of(op)->operator->input_types[n]; }
static size_t num_inputs(const CustomOp *op) { return (size_t)of(op)->operator->num_inputs; }
static int output_type(const CustomOp *op, size_t n) { return of(op)->operator->output_types[n]; }
static size_t num_outputs(const CustomOp *op) { return (size_t)of(op)->operator->num_outputs; }
static int required(const CustomOp *op, size_t n) { return (void)op, (void)n, 0; }
static int on_device(const CustomOp *op, size_t n) { return (void)op, (void)n, 0; }
static int none(const CustomOp *op) { return (void)op, 0; }

/* ---- registering ----------------------------------------------------------------------------------------------- */
static const Table *offered;

void surgeon_offer(const Table *table) { offered = table; }

Status *RegisterCustomOps(Options *options, const ApiBase *base) {
    Api api = base->get_api(API_VERSION);
    const Table *table = offered;
    Domain *domain = NULL;
    Driver driver = {0};
    offered = NULL;
    CreateStatus say = (CreateStatus)api[CREATE_STATUS];
    if (table == NULL) return say(FAIL, "surgeon's library of kernels is loaded by surgeon alone");
    if (!open_driver(table->driver, &driver)) return say(FAIL, "the CUDA driver does not load");
    Status *status = ((CreateDomain)api[CREATE_DOMAIN])(table->domain, &domain);
    if (status) return status;
    for (int n = 0; n < table->num_operators; n++) {
        Registered *registered = calloc(1, sizeof *registered);
        if (registered == NULL) return say(FAIL, "out of memory");
        registered->op = (CustomOp){
            .version = API_VERSION,
            .name = name,
            .provider = provider,
            .input_type = input_type,
            .num_inputs = num_inputs,
            .output_type = output_type,
            .num_outputs = num_outputs,
            .destroy_kernel = destroy_kernel,
            .input_characteristic = required,
            .output_characteristic = required,
            .input_memory = on_device,
            .variadic_inputs = none,
            .variadic_inputs_alike = none,
            .variadic_outputs = none,
            .variadic_outputs_alike = none,
            .create_kernel_with_status = create_kernel,
            .compute = compute,
        };
        registered->table = table, registered->operator = &table->operators[n];
        registered->driver = driver, registered->api = api;
        pthread_mutex_init(&registered->lock, NULL);
        if ((status = ((DomainAdd)api[DOMAIN_ADD])(domain, registered))) return status;
    }
    return ((AddDomain)api[ADD_DOMAIN])(options, domain);
}

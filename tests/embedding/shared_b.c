/* One table for two files: this one relies on the other's. */
#include <Python.h>
#define OPTCORE_UNIQUE_SYMBOL shared_optcore_table
#define OPTCORE_NO_IMPORT
#include <optcore.h>

double shared_default_scale(void);

double shared_default_scale(void) {
    return optcore_defaults().grad_scale;
}

# Builds the extension for aarch64 on another machine. LATENTFORGE_SYSROOT holds an arm64 Python's files (cross.py).
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_TRY_COMPILE_PLATFORM_VARIABLES LATENTFORGE_SYSROOT)

# The interpreter that runs build scripts is this machine's; headers and the file's suffix are the target's.
file(GLOB Python_INCLUDE_DIR "${LATENTFORGE_SYSROOT}/usr/include/python3.*")
set(PYTHON_MODULE_EXTENSION ".so")
set(PYTHON_MODULE_DEBUG_POSTFIX "")
set(PYTHON_IS_DEBUG OFF)
# Python.h asks for aarch64-linux-gnu/python3.*/pyconfig.h; all other headers are the cross compiler's own.
set(CMAKE_CXX_FLAGS_INIT "-idirafter ${LATENTFORGE_SYSROOT}/usr/include")

#!/bin/sh
# Exit with a message if the NVIDIA driver is too old for the CUDA that requirements/gpu.txt installs.
# CUDA 13 needs driver 580: https://docs.nvidia.com/cuda/cuda-toolkit-release-notes/
needed=580
installed=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | sort -n | head -n 1)
case "${installed%%.*}" in
    "" | *[!0-9]*)
        echo "nvidia-smi does not tell the driver's version (it says: ${installed:-nothing})." \
            "vLLM and torch for CUDA 13 need NVIDIA driver $needed or newer."
        exit 2
        ;;
esac
if [ "${installed%%.*}" -lt "$needed" ]; then
    echo "This machine has NVIDIA driver $installed; vLLM and torch for CUDA 13 need $needed or newer." \
        "Update the driver, or set up for the CPU: make setup ACCELERATOR=cpu"
    exit 2
fi

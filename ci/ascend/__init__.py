"""What CI needs to try the Ascend backend on machines that have no NPU. It is test equipment and is never packaged."""

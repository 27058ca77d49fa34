"""The rules of DEPT on plain tensors; knows nothing of DeepSpeed, files or ranks."""

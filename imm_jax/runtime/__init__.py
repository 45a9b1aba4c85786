"""The machine and its processes: devices, several hosts, compilation, threads, memory, signals, progress bars."""

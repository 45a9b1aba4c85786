"""What depends on the machine: devices, several processes, compilation, threads, memory, signals, progress bars."""

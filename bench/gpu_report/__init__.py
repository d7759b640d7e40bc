"""One report of a machine, made to be sent: `twotower gpu-report`."""

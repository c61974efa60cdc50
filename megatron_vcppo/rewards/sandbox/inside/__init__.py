"""What runs inside of a sandbox. Only the standard library: these modules are all that a sandbox is given of us."""

"""What backends share that adapt other people's kernels. A library, not a backend; nothing here knows a vendor."""

"""What sees passes and backends: lowering, measuring, comparing and the command line."""

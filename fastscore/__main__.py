from fastscore.cli import main

main()

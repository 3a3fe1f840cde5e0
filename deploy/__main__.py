"""`python -m deploy` is `vggrow`."""

from deploy.cli import main

main()
